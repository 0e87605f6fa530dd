/*
 * What to do about a fault: a value, made from the address space and readahead.  Pure: nothing is claimed yet.
 */
#ifndef LAZYPAGES_FAULT_PLAN_H
#define LAZYPAGES_FAULT_PLAN_H

#include "address_space.h"
#include "ranges.h"
#include "readahead.h"

enum lp_action {
	LP_PLAN_ZERO,	  /* place a zero page */
	LP_PLAN_REFUSE,	  /* what the page holds is not known: it must not be zeros */
	LP_PLAN_COPY,	  /* claim `run` and copy it, after what else waits in `window` */
	LP_PLAN_ASK,	  /* claim `run` and ask a page server for it */
	LP_PLAN_DEFER,	  /* another thread is copying the page */
	LP_PLAN_ESCALATE, /* the page is on its way from a page server */
	LP_PLAN_LOST,	  /* no source has it */
};

struct lp_plan {
	enum lp_action action;
	struct lp_run page; /* the one page that the thread waits for */
	/* LP_PLAN_COPY, LP_PLAN_ASK: */
	struct lp_run run; /* the page, and those around it in one piece; 0 pages: another thread has claimed it meanwhile */
	uint64_t before;      /* pages of the run that lie before the page */
	struct lp_range window;	/* readahead's: what lies outside of the run may be in other pieces */
	bool single;		/* readahead brings nothing beside the page */
};

/* unsure: ranges where what is not known need not be zero. */
struct lp_plan lp_plan_fault(const struct lp_space *space, struct lp_readahead *readahead, const struct lp_ranges *unsure,
			     uint64_t addr);

#endif
