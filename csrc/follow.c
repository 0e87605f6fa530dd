#define _GNU_SOURCE
#include "follow.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define MS 1000000ull
#define LOOK_EVERY (5 * MS)	    /* while one CPU is followed, or may be soon */
#define LOOK_SELDOM (100 * MS)	    /* after looks that disagreed, or said nothing */
#define BACKGROUND_NICE 10

/* The CPU on which the only thread of a process ran last; -1 if it has several, or is not there. */
static int cpu_of(pid_t pid)
{
	char path[32], stat[1024], *field;
	long threads, cpu;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	n = read(fd, stat, sizeof(stat) - 1);
	close(fd);
	if (n <= 0)
		return -1;
	stat[n] = 0;
	/* proc_pid_stat(5): the name may hold anything; after it fields 3, 4, ...; 20 is num_threads, 39 processor */
	field = strrchr(stat, ')');
	for (int i = 2; field && i < 20; i++)
		field = strchr(field + 1, ' ');
	if (!field)
		return -1;
	threads = strtol(field, NULL, 10);
	for (int i = 20; field && i < 39; i++)
		field = strchr(field + 1, ' ');
	if (!field || threads != 1)
		return -1;
	cpu = strtol(field, NULL, 10);
	return cpu >= 0 && cpu < CPU_SETSIZE ? (int)cpu : -1;
}

void lp_follow_init(struct lp_follow *f)
{
	memset(f, 0, sizeof(*f));
	atomic_init(&f->cpu, -1);
	f->seen = -1;
	f->able = !sched_getaffinity(0, sizeof(f->home), &f->home) && CPU_COUNT(&f->home) > 1;
}

void lp_follow_nobody(struct lp_follow *f)
{
	if (atomic_exchange(&f->cpu, -1) >= 0)
		sched_setaffinity(0, sizeof(f->home), &f->home);
	f->seen = -1;
	f->next_look = 0;
}

static void go_to(struct lp_follow *f, int cpu)
{
	cpu_set_t there;

	if (cpu == atomic_load(&f->cpu))
		return;
	CPU_ZERO(&there);
	CPU_SET(cpu, &there);
	if (!sched_setaffinity(0, sizeof(there), &there))
		atomic_store(&f->cpu, cpu);
}

void lp_follow_fault(struct lp_follow *f, pid_t pid, uint64_t now)
{
	int cpu, before = f->seen;

	if (!f->able || now < f->next_look)
		return;
	cpu = pid ? cpu_of(pid) : -1;
	if (cpu >= 0 && !CPU_ISSET(cpu, &f->home))
		cpu = -1;
	if (cpu >= 0 && (before < 0 || cpu == before)) {
		go_to(f, cpu);
		f->seen = cpu;
		f->next_look = now + LOOK_EVERY;
	} else {
		/* faults come from here and from there: the scheduler knows better */
		lp_follow_nobody(f);
		f->seen = cpu;
		f->next_look = now + (cpu >= 0 ? LOOK_EVERY : LOOK_SELDOM);
	}
}

void lp_aside_begin(struct lp_aside *a, const struct lp_follow *f)
{
	int cpu = atomic_load(&f->cpu);
	cpu_set_t rest;

	errno = 0;
	a->nice = getpriority(PRIO_PROCESS, 0);
	if (a->nice < BACKGROUND_NICE)
		setpriority(PRIO_PROCESS, 0, BACKGROUND_NICE);
	a->moved = cpu >= 0 && !sched_getaffinity(0, sizeof(a->home), &a->home);
	if (!a->moved)
		return;
	rest = a->home;
	CPU_CLR(cpu, &rest);
	a->moved = CPU_COUNT(&rest) > 0 && !sched_setaffinity(0, sizeof(rest), &rest);
}

void lp_aside_end(const struct lp_aside *a)
{
	if (a->moved)
		sched_setaffinity(0, sizeof(a->home), &a->home);
	setpriority(PRIO_PROCESS, 0, a->nice);
}
