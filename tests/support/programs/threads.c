/*
 * Many threads that need their memory at once: `threads KIND THREADS PAGES BALLAST READY GO RESULTS`.
 *
 *   heap    each reads PAGES pages of its own, here and there in one mapping
 *   stacks  each reads the PAGES pages that it has used of its stack, and ends: what it frees glibc gives back to the kernel
 *           (madvise, then munmap once it has kept 40 MiB of stacks)
 *
 * Below all that lie BALLAST pages that nobody reads: what a daemon brings first in the background.
 *
 * Makes the file READY when all memory is filled and all threads wait; they go on when GO is there.  Then it writes to RESULTS,
 * in one line: ns from then until the last thread was done, the median and the longest wait of a thread for a page, in ns, and
 * how many pages were not what they should be.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))

static int nr_threads, nr_pages;
static bool stacks;
static uint64_t *heap, *waits;
static _Atomic uint32_t standing, gone_on;
static _Atomic uint64_t wrong;

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static uint64_t word(int thread, int page, size_t i)
{
	return ((uint64_t)thread << 32 | (uint64_t)(page + 1) << 16 | i) * 0x7fb5d329728ea185u;
}

/* Where page `page` of a thread is; stack: its own, else NULL.  The heap's are far apart: one fault brings one of them. */
static uint64_t *place(uint64_t *stack, int thread, int page)
{
	if (stack)
		return stack + (size_t)page * WORDS;
	return heap + ((size_t)thread * nr_pages + page) * 7919 % ((size_t)nr_threads * nr_pages) * WORDS;
}

static void fill(uint64_t *stack, int thread)
{
	for (int page = 0; page < nr_pages; page++)
		for (size_t i = 0; i < WORDS; i++)
			place(stack, thread, page)[i] = word(thread, page, i);
}

static void check(uint64_t *stack, int thread)
{
	for (int page = 0; page < nr_pages; page++) {
		const volatile uint64_t *at = place(stack, thread, page);
		uint64_t begun = now(), first = at[0];
		bool right = first == word(thread, page, 0);

		waits[thread * nr_pages + page] = now() - begun;
		for (size_t i = 1; i < WORDS; i++)
			right &= at[i] == word(thread, page, i);
		if (!right)
			atomic_fetch_add(&wrong, 1);
	}
}

static void await_go(void)
{
	atomic_fetch_add(&standing, 1);
	while (!atomic_load(&gone_on))
		syscall(SYS_futex, &gone_on, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
}

static void *run(void *argument)
{
	int thread = (int)(intptr_t)argument;

	if (stacks) {
		uint64_t own[(size_t)nr_pages * WORDS];

		fill(own, thread);
		await_go();
		check(own, thread);
	} else {
		fill(NULL, thread);
		await_go();
		check(NULL, thread);
	}
	return NULL;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void touch(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0)
		exit(3);
	close(fd);
}

int main(int argc, char **argv)
{
	const struct timespec pause = {.tv_nsec = 1000000};
	pthread_attr_t attributes;
	pthread_t *threads;
	uint64_t begun, took;
	void *ballast;
	size_t size;
	char line[128];
	int fd, length;

	if (argc != 8)
		return 64;
	stacks = !strcmp(argv[1], "stacks");
	nr_threads = atoi(argv[2]);
	nr_pages = atoi(argv[3]);
	size = (size_t)nr_threads * nr_pages * PAGE;
	heap = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	waits = mmap(NULL, size / PAGE * sizeof(*waits), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	threads = calloc((size_t)nr_threads, sizeof(*threads));
	if (heap == MAP_FAILED || waits == MAP_FAILED || !threads)
		return 3;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, (size_t)(nr_pages + 256) * PAGE);
	for (int i = 0; i < nr_threads; i++)
		if (pthread_create(&threads[i], &attributes, run, (void *)(intptr_t)i))
			return 3;
	while (atomic_load(&standing) < (uint32_t)nr_threads)
		nanosleep(&pause, NULL);
	for (long i = 0; i < atol(argv[4]); i += 4096) { /* pieces, each below the one before */
		ballast = mmap(NULL, 4096 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (ballast == MAP_FAILED)
			return 3;
		memset(ballast, 1, 4096 * PAGE);
	}
	touch(argv[5]);
	while (access(argv[6], F_OK))
		nanosleep(&pause, NULL);
	begun = now();
	atomic_store(&gone_on, 1);
	syscall(SYS_futex, &gone_on, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	for (int i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	took = now() - begun;
	qsort(waits, size / PAGE, sizeof(*waits), compare);
	length = snprintf(line, sizeof(line), "%lu %lu %lu %lu\n", took, waits[size / PAGE / 2], waits[size / PAGE - 1],
			  atomic_load(&wrong));
	fd = open(argv[7], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	return fd < 0 || write(fd, line, (size_t)length) != length || atomic_load(&wrong);
}
