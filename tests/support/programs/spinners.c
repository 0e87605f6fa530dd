/*
 * A tree of processes that hardly rests: each of PROCESSES processes (a child of the one before) has THREADS threads that
 * count nearly all the time, and one that sleeps for short moments. `spinners` prints the address of its counters and the pids.
 * SIGCONT and SIGCHLD are counted too: whoever stops and continues the tree without being asked to is found out.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES 3
#define THREADS 2

/* What a test reads from outside; private to each process. */
struct counters {
	volatile uint64_t continued, children, naps;
	struct {
		volatile uint64_t count, triple; /* triple == 3 * count, or count is one ahead */
	} thread[THREADS];
} *counters;

static void note(int signo)
{
	if (signo == SIGCONT)
		counters->continued++;
	else
		counters->children++;
}

static void *spin(void *argument)
{
	long number = (long)argument;

	for (;;) {
		struct timespec ts = { 0, 1000000 };

		for (int i = 0; i < 100000; i++) {
			counters->thread[number].count++;
			counters->thread[number].triple += 3;
		}
		while (nanosleep(&ts, &ts)) /* leaves some of the CPUs to the rest of the machine */
			;
	}
	return NULL;
}

static void *nap(void *argument)
{
	(void)argument;
	for (;;) {
		struct timespec ts = { 0, 500000 };

		while (nanosleep(&ts, &ts))
			;
		counters->naps++;
	}
	return NULL;
}

int main(void)
{
	struct sigaction action = { .sa_handler = note, .sa_flags = SA_RESTART };
	pthread_t thread;
	int ready[2];
	char byte;

	counters = mmap(NULL, 64 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int page = 1; page < 64; page++)
		((volatile char *)counters)[page << 12] = page;
	sigaction(SIGCONT, &action, NULL);
	sigaction(SIGCHLD, &action, NULL);
	printf("%lx\n%d\n", (unsigned long)counters, getpid());
	fflush(stdout);
	for (int level = 1; level < PROCESSES; level++) {
		if (pipe(ready))
			return 1;
		if (fork()) {
			close(ready[1]);
			if (read(ready[0], &byte, 1) != 0)
				return 1;
			close(ready[0]);
			break;
		}
		close(ready[0]);
		printf("%d\n", getpid());
		fflush(stdout);
		/* The pipe's last end is closed when all below are there. */
	}
	for (long number = 0; number < THREADS; number++)
		pthread_create(&thread, NULL, spin, (void *)number);
	pthread_create(&thread, NULL, nap, NULL);
	for (int fd = 3; fd < 16; fd++)
		close(fd);
	for (;;)
		pause();
}
