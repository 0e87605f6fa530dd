#define _GNU_SOURCE
#include "dump_compare.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

static __thread sigjmp_buf *volatile on_bus_error;

static void bus_error(int number)
{
	if (on_bus_error)
		siglongjmp(*on_bus_error, 1);
	signal(number, SIG_DFL); /* of another thread: the access is repeated, and ends the process */
}

/* 0 if they differ, or one of them can't be read. */
static int same(const unsigned char *page, const unsigned char *other)
{
	sigjmp_buf back;
	int equal;

	if (sigsetjmp(back, 0)) {
		on_bus_error = NULL;
		return 0;
	}
	on_bus_error = &back;
	atomic_signal_fence(memory_order_seq_cst);
	equal = !memcmp(page, other, LP_PAGE_SIZE);
	atomic_signal_fence(memory_order_seq_cst);
	on_bus_error = NULL;
	return equal;
}

/* Where the parent levels have a page; NULL if they don't. Addresses must come in ascending order. */
static const unsigned char *in_parent(struct lp_compared *c, uint64_t address)
{
	const struct lp_extent *held;
	const struct lp_mapped *level;
	uint64_t offset;

	while (c->next < c->nr_held && lp_extent_end(c->held + c->next) <= address)
		c->next++;
	held = c->held + c->next;
	if (c->next == c->nr_held || held->start > address || held->source == LP_SOURCE_REMOTE ||
	    held->source == LP_SOURCE_LOST)
		return NULL;
	level = c->levels + held->source;
	offset = held->offset + (address - held->start);
	if (!level->bytes || level->size < LP_PAGE_SIZE || offset > level->size - LP_PAGE_SIZE)
		return NULL;
	return level->bytes + offset;
}

int lp_compare_pages(struct lp_compared *compared, const struct lp_run *runs, size_t nr_runs,
		     struct lp_cursor *cursor, uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out)
{
	struct sigaction now = { .sa_handler = bus_error, .sa_flags = SA_NODEFER }, before;

	if (room < max_pages || room - max_pages < *nr_out)
		return -ENOBUFS;
	if (sigaction(SIGBUS, &now, &before))
		return -errno;
	for (; cursor->run < nr_runs && max_pages; max_pages--) {
		const struct lp_run *run = runs + cursor->run;
		uint64_t address = run->start + cursor->offset;
		const unsigned char *old = in_parent(compared, address);

		lp_append_run(out, room, nr_out, address, address + LP_PAGE_SIZE,
			      old && same(compared->memory + address, old) ? LP_PARENT : run->flags);
		cursor->offset += LP_PAGE_SIZE;
		if (address + LP_PAGE_SIZE >= run->end)
			*cursor = (struct lp_cursor){ cursor->run + 1, 0 };
	}
	sigaction(SIGBUS, &before, NULL);
	return 0;
}
