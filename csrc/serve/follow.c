#define _GNU_SOURCE
#include "follow.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define US 1000ull
#define MS 1000000ull
#define LOOK_SOON (100 * US)	 /* after a move; doubled as long as looks agree */
#define LOOK_NEW (50 * US)	 /* after any other, when another process begins to fault again and again */
#define LOOK_EVERY (5 * MS)	 /* while they do */
#define LOOK_CROWD (5 * MS)	 /* after more faults at once than there are CPUs */
#define LOOK_SELDOM (100 * MS)	 /* after looks that say nothing */
#define MOVE_PAUSE (1 * MS)	 /* moves in shorter turns, more than so many: the scheduler knows better */
#define MOVE_TRIES 3
#define WATCH_NS (8 * MS)	 /* giving way without progress for so long, or for twice that, is ended */
#define PENALTY (100 * MS)	 /* how long not to give way after that; doubled each time */
#define PENALTY_MAX (3200 * MS)
#define BACKGROUND_NICE 3	 /* not more: threads that wait for what it has locked would wait long on a busy machine */

/* ---- giving way ---- */

static bool set_policy(pid_t tid, int policy)
{
	const struct sched_param none = {0};

	return !sched_setscheduler(tid, policy, &none);
}

static void pause_ns(uint64_t ns)
{
	const struct timespec time = {.tv_nsec = (long)ns};

	nanosleep(&time, NULL);
}

/*
 * Sleeps while the serving thread does not give way.  When that gives way and makes no progress, another thread than the one that
 * it has woken may keep it from its CPU: it gets its old scheduling class, and every CPU to run on.
 */
static void *watch(void *arg)
{
	struct lp_follow *f = arg;

	while (!atomic_load(&f->stop)) {
		uint32_t before = atomic_load(&f->progress);

		if (!atomic_load(&f->yields)) {
			atomic_store(&f->asleep, 1);
			if (!atomic_load(&f->yields) && !atomic_load(&f->stop))
				syscall(SYS_futex, &f->asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
			atomic_store(&f->asleep, 0);
			continue;
		}
		pause_ns(WATCH_NS);
		if (atomic_load(&f->yields) && atomic_load(&f->progress) == before) {
			set_policy(f->tid, SCHED_OTHER);
			sched_setaffinity(f->tid, sizeof(f->home), &f->home);
			atomic_store(&f->rescued, true);
		}
	}
	return NULL;
}

static void wake_watcher(struct lp_follow *f)
{
	if (atomic_exchange(&f->asleep, 0))
		syscall(SYS_futex, &f->asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Whether a thread that has become SCHED_IDLE may change back; without CAP_SYS_NICE it may not (sched(7)). */
static void *try_yield(void *arg)
{
	*(bool *)arg = set_policy(0, SCHED_IDLE) && set_policy(0, SCHED_OTHER);
	return NULL;
}

static bool can_yield(void)
{
	bool can = false;
	pthread_t thread;

	if (sched_getscheduler(0) != SCHED_OTHER || pthread_create(&thread, NULL, try_yield, &can))
		return false;
	pthread_join(thread, NULL);
	return can;
}

void lp_follow_yield(struct lp_follow *f, uint64_t now)
{
	if (!f->watched || atomic_load(&f->cpu) < 0 || now < f->not_before)
		return;
	atomic_fetch_add(&f->progress, 1);
	if (atomic_load(&f->yields))
		return;
	atomic_store(&f->yields, true);
	wake_watcher(f);
	set_policy(0, SCHED_IDLE);
}

void lp_follow_insist(struct lp_follow *f)
{
	if (!atomic_load(&f->yields))
		return;
	set_policy(0, SCHED_OTHER);
	atomic_store(&f->yields, false);
	atomic_fetch_add(&f->progress, 1);
}

/* We have been kept from our CPU: not for a while then. */
static void pay(struct lp_follow *f, uint64_t now)
{
	if (!atomic_exchange(&f->rescued, false))
		return;
	lp_follow_none(f);
	f->penalty = now < f->not_before + 2 * f->penalty ? f->penalty * 2 : PENALTY;
	if (f->penalty > PENALTY_MAX)
		f->penalty = PENALTY_MAX;
	f->not_before = now + f->penalty;
}

/* ---- following ---- */

/* The CPU on which the only thread of a process ran last; -1 if it has several, or is not there. */
static int cpu_of(struct lp_follow *f, pid_t pid)
{
	char path[32], stat[1024], *field;
	long threads, cpu;
	ssize_t n;

	if (pid != f->pid) {
		if (f->stat_fd >= 0)
			close(f->stat_fd);
		snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
		f->stat_fd = open(path, O_RDONLY | O_CLOEXEC);
		f->pid = pid;
	}
	n = f->stat_fd < 0 ? -1 : pread(f->stat_fd, stat, sizeof(stat) - 1, 0);
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
	/* places may be taken already */
	memset(f, 0, offsetof(struct lp_follow, places));
	atomic_init(&f->cpu, -1);
	f->stat_fd = -1;
	f->tid = (pid_t)syscall(SYS_gettid);
	f->able = !sched_getaffinity(0, sizeof(f->home), &f->home) && CPU_COUNT(&f->home) > 1;
	f->watched = f->able && can_yield() && !pthread_create(&f->watcher, NULL, watch, f);
}

void lp_follow_end(struct lp_follow *f)
{
	lp_follow_none(f);
	if (f->watched) {
		atomic_store(&f->stop, true);
		wake_watcher(f);
		pthread_join(f->watcher, NULL);
		f->watched = false;
	}
	if (f->stat_fd >= 0)
		close(f->stat_fd);
	f->stat_fd = -1;
}

void lp_follow_none(struct lp_follow *f)
{
	lp_follow_insist(f);
	if (atomic_exchange(&f->cpu, -1) >= 0)
		sched_setaffinity(0, sizeof(f->home), &f->home);
	f->next_look = 0;
}

static bool go_to(struct lp_follow *f, int cpu)
{
	cpu_set_t there;

	CPU_ZERO(&there);
	CPU_SET(cpu, &there);
	if (sched_setaffinity(0, sizeof(there), &there))
		return false;
	atomic_store(&f->cpu, cpu);
	return true;
}

static uint64_t next_interval(struct lp_follow *f)
{
	return f->interval = f->interval * 2 < LOOK_EVERY ? f->interval * 2 : LOOK_EVERY;
}

void lp_follow_fault(struct lp_follow *f, pid_t pid, uint64_t now, int at_once)
{
	bool soon = pid == f->pid && now < f->moved + MOVE_PAUSE, again = pid == f->last_pid;
	int cpu;

	if (!f->able)
		return;
	pay(f, now);
	f->last_pid = pid;
	if (at_once > CPU_COUNT(&f->home)) {
		/* every CPU has somebody to run: where there is room, the scheduler knows */
		lp_follow_none(f);
		f->next_look = f->looked = now + LOOK_CROWD; /* the others' looks are from then on, too */
		return;
	}
	if (now < f->next_look && !(again && pid && pid != f->pid && now > f->looked + LOOK_NEW))
		return;
	f->looked = now;
	cpu = pid ? cpu_of(f, pid) : -1;
	if (cpu < 0 || !CPU_ISSET(cpu, &f->home) || (cpu != atomic_load(&f->cpu) && soon && f->tries == MOVE_TRIES)) {
		/* nothing is known, or it changes too quickly */
		lp_follow_none(f);
		f->next_look = now + (cpu < 0 ? LOOK_SELDOM : next_interval(f));
	} else if (cpu == atomic_load(&f->cpu)) {
		f->next_look = now + next_interval(f);
	} else if (go_to(f, cpu)) {
		f->tries = soon ? f->tries + 1 : 0;
		f->moved = now;
		f->interval = LOOK_SOON;
		f->next_look = now + f->interval;
	}
}

/* ---- the background ---- */

void lp_aside_begin(struct lp_aside *a, struct lp_follow *f)
{
	uint32_t places = atomic_load(&f->places);

	do
		a->place = ~places & (places + 1); /* the lowest; none when there are more than 32 */
	while (!atomic_compare_exchange_weak(&f->places, &places, places | a->place));
	errno = 0;
	/* woken, it does not take the CPU from one that holds a lock which a fault waits for (sched(7)) */
	a->batch = sched_getscheduler(0) == SCHED_OTHER && set_policy(0, SCHED_BATCH);
	a->nice = getpriority(PRIO_PROCESS, 0);
	if (a->nice < BACKGROUND_NICE)
		setpriority(PRIO_PROCESS, 0, BACKGROUND_NICE);
	a->cpu = -1;
	if (sched_getaffinity(0, sizeof(a->home), &a->home))
		CPU_ZERO(&a->home);
}

bool lp_aside_look(struct lp_aside *a, const struct lp_follow *f, bool faults)
{
	int cpu = faults ? atomic_load(&f->cpu) : -1, others = CPU_COUNT(&a->home) - 1;
	cpu_set_t rest = a->home;

	if (cpu != a->cpu && others > 0) {
		if (cpu >= 0)
			CPU_CLR(cpu, &rest);
		sched_setaffinity(0, sizeof(rest), &rest);
		a->cpu = cpu;
	}
	return a->cpu < 0 || others >= 32 || (a->place && a->place < 1u << others);
}

void lp_aside_end(const struct lp_aside *a, struct lp_follow *f)
{
	atomic_fetch_and(&f->places, ~a->place);
	if (a->cpu >= 0)
		sched_setaffinity(0, sizeof(a->home), &a->home);
	setpriority(PRIO_PROCESS, 0, a->nice);
	if (a->batch)
		set_policy(0, SCHED_OTHER);
}
