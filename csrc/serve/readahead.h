/*
 * Readahead: how much to bring beside the page that a thread waits for.
 * Pure.  A task has a few streams; a fault that continues one doubles its
 * window, any other fault brings one page and starts a stream anew.
 */
#ifndef LAZYPAGES_READAHEAD_H
#define LAZYPAGES_READAHEAD_H

#include <stdint.h>

#define LP_STREAMS 4

struct lp_stream {
	uint64_t up, down; /* the page numbers at which it would go on, upwards and downwards */
	uint64_t window;   /* pages of the last answer; 0: unused */
	uint64_t used;	   /* when, in faults */
};

struct lp_readahead {
	uint64_t max_window; /* pages; 1: no readahead */
	uint64_t clock;
	struct lp_stream streams[LP_STREAMS];
};

/* Pages [first, first + nr) to bring for a fault at `page` (page numbers); page is among them. */
struct lp_window {
	uint64_t first, nr;
};

void lp_readahead_init(struct lp_readahead *plan, uint64_t max_window);
struct lp_window lp_readahead_fault(struct lp_readahead *plan, uint64_t page);

#endif
