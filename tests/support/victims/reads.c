/* One task whose layout stays as it was: reads, writes, threads, stack and heap. */
#define _GNU_SOURCE
#include "victim.h"

#include <alloca.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static unsigned char initialised[64 * 4096] = { 1 };
static unsigned char bss[64 * 4096];

/* All kinds of lazy memory that one plain task has: mapping, never touched, data, bss, malloc. */
static void single(void)
{
	struct region data = region_new(PAGES(24 * MIB)), untouched = region_map(PAGES(4 * MIB));
	struct region globals = { .at = (void *)(((uintptr_t)initialised + PAGE) & -PAGE), .pages = 62, .id = 1000 };
	struct region zeroed = { .at = (void *)(((uintptr_t)bss + PAGE) & -PAGE), .pages = 62, .id = 1001 };
	void *small = malloc(100 * PAGE);
	struct region heap = { .at = (void *)(((uintptr_t)small + PAGE) & -PAGE), .pages = 98, .id = 1002 };

	fill(globals);
	fill(zeroed);
	fill(heap);
	ready();
	wait_go();
	struct tally t = { .name = "single" };
	expect_region(&t, data);
	expect_region(&t, globals);
	expect_region(&t, zeroed);
	expect_region(&t, heap);
	expect_zeros(&t, untouched.at, untouched.pages);
	expect_region(&t, data); /* and it stays so */
	expect_zeros(&t, untouched.at, untouched.pages);
	report(&t);
	free(small);
}

/* For tests that count pages: nothing but one region, of which every page is told apart. */
static void plain(void)
{
	struct region data = region_new(PAGES(16 * MIB));

	ready();
	wait_go();
	struct tally t = { .name = "plain" };
	expect_region(&t, data);
	report(&t);
}

#define NR_THREADS 8
static struct region shared, never;
static pthread_barrier_t filled;
static pthread_attr_t attributes;
static __thread unsigned char tls[2 * 4096];

/* Its own eighth first, then everything, while the others do the same. */
static void *reader(void *argument)
{
	size_t number = (size_t)argument, part = shared.pages / NR_THREADS;
	struct region own = { .at = (void *)(((uintptr_t)tls + PAGE) & -PAGE), .pages = 1, .id = 2000 + number };
	struct tally t = { .name = "thread" };

	if (number < NR_THREADS) { /* those of before the checkpoint */
		fill(own);
		pthread_barrier_wait(&filled);
	}
	wait_go();
	expect_region(&t, slice(shared, number % NR_THREADS * part, part));
	expect_region(&t, shared);
	expect_zeros(&t, never.at, never.pages);
	if (number < NR_THREADS)
		expect_region(&t, own);
	report(&t);
	return NULL;
}

static void start_readers(pthread_t *threads, size_t first)
{
	for (size_t i = 0; i < NR_THREADS; i++)
		if (pthread_create(&threads[i], &attributes, reader, (void *)(first + i)))
			die("pthread_create");
}

/* Threads of before the checkpoint and threads made after it. */
static void run_threads(void)
{
	pthread_t old[NR_THREADS], new[NR_THREADS];

	shared = region_new(PAGES(24 * MIB));
	never = region_map(PAGES(2 * MIB));
	pthread_barrier_init(&filled, NULL, NR_THREADS + 1);
	start_readers(old, 0);
	pthread_barrier_wait(&filled);
	ready();
	wait_go();
	start_readers(new, NR_THREADS);
	for (size_t i = 0; i < NR_THREADS; i++)
		if (pthread_join(old[i], NULL) || pthread_join(new[i], NULL))
			die("pthread_join");
}

/* glibc unmaps stacks of threads that have ended when it has more than 40 MiB of them: some of these. */
static void threads(void)
{
	pthread_attr_init(&attributes);
	run_threads();
}

/* The same, and no stack is unmapped. */
static void small_stacks(void)
{
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 << 10);
	run_threads();
}

/* The first touch of a page is a write of a part of it; the rest of the page must be what it was. */
static void writes(void)
{
	struct region data = region_new(PAGES(24 * MIB)), untouched = region_map(PAGES(4 * MIB));
	size_t i;

	ready();
	wait_go();
	struct tally t = { .name = "writes" };
	for (struct walk w = walk_over(data.pages, 1); walk_next(&w, &i);)
		*(volatile uint64_t *)(data.at + i * PAGE) = i;
	for (struct walk w = walk_over(data.pages, 2); walk_next(&w, &i);)
		expect_tagged(&t, data, i, 1, i);
	for (struct walk w = walk_over(untouched.pages, 3); walk_next(&w, &i);) {
		volatile uint64_t *last = (volatile uint64_t *)(untouched.at + (i + 1) * PAGE) - 1;

		*last = ~i;
		expect(&t, *last == ~i, "a write to an untouched page got lost");
		*last = 0;
	}
	expect_zeros(&t, untouched.at, untouched.pages);
	report(&t);
}

/* Every second page touched: 20,000 runs of one page each. */
static void fragments(void)
{
	struct region sparse = region_map(40000);
	size_t i;

	for (i = 0; i < sparse.pages; i += 2)
		fill(slice(sparse, i, 1));
	ready();
	wait_go();
	struct tally t = { .name = "fragments" };
	for (struct walk w = walk_over(sparse.pages, 1); walk_next(&w, &i);)
		if (i % 2)
			expect_zero(&t, sparse.at + i * PAGE);
		else
			expect_data(&t, sparse, i);
	report(&t);
}

/* Uses fresh stack, 64 KiB a call, down to some MiB below what the checkpoint saw. */
static __attribute__((noinline)) void dive(struct tally *t, int depth)
{
	volatile unsigned char frame[64 << 10];

	memset((void *)frame, depth, sizeof frame);
	if (depth)
		dive(t, depth - 1);
	for (size_t i = 0; i < sizeof frame; i += 64)
		if (frame[i] != depth) {
			expect(t, false, "fresh stack lost its contents");
			return;
		}
}

/* A deep frame full of data, and the stack grows further after the restore. */
static void stack(void)
{
	size_t bytes = 3 * MIB;
	unsigned char *frame = alloca(bytes + PAGE);
	struct region data = { .at = (void *)(((uintptr_t)frame + PAGE) & -PAGE), .pages = PAGES(bytes), .id = 1000 };

	fill(data);
	ready();
	wait_go();
	struct tally t = { .name = "stack" };
	expect_region(&t, slice(data, 0, data.pages / 2));
	dive(&t, 32);
	expect_region(&t, data);
	report(&t);
}

static unsigned char *break_to(unsigned char *to)
{
	if (brk(to))
		die("brk");
	return to;
}

/* The heap grows and shrinks by brk while its pages are missing. */
static void heap(void)
{
	unsigned char *start = (void *)(((uintptr_t)sbrk(0) + PAGE - 1) & -PAGE);
	struct region data = { .at = start, .pages = PAGES(16 * MIB), .id = 1000 };

	break_to(start + 16 * MIB);
	fill(data);
	ready();
	wait_go();
	struct tally t = { .name = "heap" };
	break_to(start + 20 * MIB);
	expect_region(&t, slice(data, PAGES(14 * MIB), PAGES(1 * MIB)));
	expect_zeros(&t, start + 16 * MIB, PAGES(4 * MIB));
	break_to(start + 8 * MIB); /* gives up touched and missing pages */
	expect_region(&t, slice(data, 0, PAGES(4 * MIB)));
	break_to(start + 24 * MIB);
	expect_zeros(&t, start + 8 * MIB, PAGES(16 * MIB));
	expect_region(&t, slice(data, 0, PAGES(8 * MIB)));
	report(&t);
	break_to(start);
}

static void protect(unsigned char *at, size_t pages, int how)
{
	if (mprotect(at, pages * PAGE, how))
		die("mprotect");
}

/* One VMA becomes a thousand while its pages are missing; uffd tells nobody. */
static void protection(void)
{
	struct region data = region_new(PAGES(32 * MIB)), untouched = region_map(PAGES(2 * MIB));
	size_t run = 8, i;

	ready();
	wait_go();
	struct tally t = { .name = "protection" };
	for (i = 0; i < data.pages; i += 2 * run)
		protect(data.at + i * PAGE, run, i % (4 * run) ? PROT_READ : PROT_NONE);
	for (i = run; i < data.pages; i += 2 * run)
		expect_region(&t, slice(data, i, run));
	protect(untouched.at, untouched.pages / 2, PROT_READ);
	expect_zeros(&t, untouched.at, untouched.pages);
	for (i = 0; i < data.pages; i += 2 * run)
		protect(data.at + i * PAGE, run, PROT_READ | PROT_EXEC);
	expect_region(&t, data);
	protect(data.at, data.pages, PROT_READ | PROT_WRITE);
	for (i = 0; i < data.pages; i++)
		*(volatile uint64_t *)(data.at + i * PAGE) = i;
	for (i = 0; i < data.pages; i++)
		expect_tagged(&t, data, i, 1, i);
	report(&t);
}

/* Endless: for tests that end it, or its daemon, from outside while pages are missing. */
static void forever(void)
{
	struct region data = region_new(PAGES(32 * MIB));

	ready();
	wait_go();
	struct tally t = { .name = "forever" };
	expect_region(&t, data);
	report(&t);
	for (;;)
		pause();
}

const struct scenario read_scenarios[] = {
	{ "single", single }, { "plain", plain }, { "threads", threads }, { "small_stacks", small_stacks },
	{ "writes", writes }, { "fragments", fragments }, { "stack", stack }, { "heap", heap }, { "protection", protection },
	{ "forever", forever }, { 0 },
};
