/*
 * Threads claim, release, lose, regain and commit pages of one address space
 * until all have arrived.  Exits 1 when a page has two holders at a time, or
 * arrives twice, or the counts disagree at the end.
 *
 * Then two sources: one loses each page while the other one brings it.
 */
#define _GNU_SOURCE
#include "serve/address_space.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef PAGES
#define PAGES 20000
#endif
#define THREADS 4

static struct lp_space *space;
static atomic_int holders[PAGES];
static _Atomic uint64_t arrived;

static void fail(const char *what, uint64_t page)
{
	fprintf(stderr, "%s: page %lu\n", what, (unsigned long)page);
	exit(1);
}

static void *work(void *arg)
{
	unsigned seed = (unsigned)(size_t)arg;

	while (lp_space_pending(space)) {
		uint64_t from = (uint64_t)rand_r(&seed) % PAGES, most = 1 + (uint64_t)rand_r(&seed) % 150, nr;

		nr = lp_space_claim(space, from, most < PAGES - from ? most : PAGES - from);
		for (uint64_t i = from; i < from + nr; i++)
			if (atomic_fetch_add(&holders[i], 1))
				fail("two holders", i);
		for (uint64_t i = from; i < from + nr; i++)
			atomic_fetch_sub(&holders[i], 1);
		switch (rand_r(&seed) % 8) {
		case 0:
			arrived += lp_space_commit(space, from, nr);
			break;
		case 1:
			lp_space_mark_lost(space, from, nr);
			lp_space_retry_lost(space);
			break;
		default:
			lp_space_release(space, from, nr);
		}
	}
	return NULL;
}

static _Atomic uint64_t turn; /* how often somebody has come to a page */

/* Both do the same page at the same time, as nearly as that can be had. */
static void meet(uint64_t page)
{
	uint64_t both = 2 * (page + 1);

	if (atomic_fetch_add(&turn, 1) + 1 == both)
		return;
	for (unsigned spins = 0; atomic_load(&turn) < both; spins++)
		if (spins > 10000)
			sched_yield(); /* on one CPU */
}

static void *loses(void *arg)
{
	for (uint64_t page = 0; page < PAGES; page++) {
		meet(page);
		lp_space_mark_lost(space, page, 1);
	}
	return arg;
}

static void *brings(void *arg)
{
	for (uint64_t page = 0; page < PAGES; page++) {
		meet(page);
		for (volatile unsigned i = 0; i < page % 32; i++)
			;
		arrived += lp_space_commit(space, page, 1);
		if (lp_space_lost(space) > 2) /* this one, and the one before it for a moment */
			fail("lost", page);
	}
	return arg;
}

static void *(*const sources[])(void *) = {loses, brings};

int main(void)
{
	const struct lp_extent extent = {.start = 0x100000, .nr_pages = PAGES, .lazy = 1};
	const struct lp_range vma = {0x100000, 0x100000 + PAGES * LP_PAGE_SIZE};
	pthread_t threads[THREADS];

	for (int round = 0; round < 5; round++) {
		space = lp_space_new(&extent, 1, &vma, 1, NULL, 0);
		arrived = 0;
		for (size_t i = 0; i < THREADS; i++)
			pthread_create(&threads[i], NULL, work, (void *)(i + 1));
		for (size_t i = 0; i < THREADS; i++)
			pthread_join(threads[i], NULL);
		if (arrived != PAGES || lp_space_lost(space))
			fail("arrived or lost", arrived);
		lp_space_free(space);
	}
	for (int round = 0; round < 5; round++) {
		space = lp_space_new(&extent, 1, &vma, 1, NULL, 0);
		arrived = turn = 0;
		for (size_t i = 0; i < 2; i++)
			pthread_create(&threads[i], NULL, sources[i], NULL);
		for (size_t i = 0; i < 2; i++)
			pthread_join(threads[i], NULL);
		if (arrived != PAGES || lp_space_pending(space) || lp_space_lost(space))
			fail("arrived from one of two, or lost", arrived);
		lp_space_free(space);
	}
	return 0;
}
