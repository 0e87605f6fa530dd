/*
 * Comparing shared memory with the bytes that the parent levels have of it, both mapped into this process.
 */
#ifndef LAZYPAGES_DUMP_COMPARE_H
#define LAZYPAGES_DUMP_COMPARE_H

#include <stddef.h>
#include <stdint.h>

#include "common/extent.h"
#include "dump/dump_pages.h"

/* A mapped pages file. bytes NULL: there is none. */
struct lp_mapped {
	const unsigned char *bytes;
	uint64_t size;
};

struct lp_compared {
	const unsigned char *memory; /* the page with address 0 of the runs */
	const struct lp_extent *held; /* where the chain has each page, sorted */
	size_t nr_held;
	const struct lp_mapped *levels;
	size_t next; /* 0 at first: index of the extent to continue the search from */
};

/*
 * Compares the pages from *cursor on, until max_pages were looked at or all runs are done (cursor->run == nr_runs), and
 * appends them to out: with the flag PARENT those whose bytes are the same in the parent levels, else with their own
 * flags. `room` must be at least max_pages + the number of entries already there. Pages that can't be read (SIGBUS: a
 * file was cut short, its disk fails) are not the same.
 *
 * The process must not run it in two threads: it handles SIGBUS meanwhile. 0 or -errno.
 */
int lp_compare_pages(struct lp_compared *compared, const struct lp_run *runs, size_t nr_runs,
		     struct lp_cursor *cursor, uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out);

#endif
