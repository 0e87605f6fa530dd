/*
 * Faults that wait for an answer, oldest first, one for each page: when a page is placed the kernel wakes all threads that wait
 * for it, so a second fault on it that has been read before needs no answer of its own.  With thousands of threads there are many
 * of these.
 */
#ifndef LAZYPAGES_FAULTS_H
#define LAZYPAGES_FAULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lp_fault {
	uint64_t addr;	/* of the page */
	uint64_t since; /* CLOCK_MONOTONIC ns when the first fault on it was read */
	uint32_t times; /* faults that were read */
};

/* All zero: empty. */
struct lp_faults {
	struct lp_fault *ring;
	uint64_t first; /* fault number n is at n & (cap - 1) */
	size_t nr, cap;	/* cap: a power of two */
	uint64_t *pages; /* twice as many slots, by hash: its number + 1 of each fault; 0: free */
};

void lp_faults_free(struct lp_faults *faults);
/* Room for so many more: false if there is no memory. */
bool lp_faults_reserve(struct lp_faults *faults, size_t nr);
/* False: no memory. */
bool lp_faults_push(struct lp_faults *faults, struct lp_fault fault);
/* By address from `from` on, round to those before it; from here on that is what "oldest" means. */
void lp_faults_sort(struct lp_faults *faults, uint64_t from);
/* The n-th oldest, n < nr. */
struct lp_fault *lp_faults_at(const struct lp_faults *faults, size_t n);
/* The oldest; there is one. */
struct lp_fault lp_faults_pop(struct lp_faults *faults);

#endif
