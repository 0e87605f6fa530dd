#include "fault_plan.h"

static void widen(struct lp_plan *plan, const struct lp_space *space, struct lp_window window)
{
	uint64_t addr = plan->page.addr, before = (addr >> LP_PAGE_SHIFT) - window.first, nr = window.nr - before;

	plan->single = window.nr == 1;
	plan->window.start = window.first << LP_PAGE_SHIFT;
	plan->window.end = plan->window.start + (window.nr << LP_PAGE_SHIFT);
	if (nr > 1)
		plan->run = lp_space_lookup(space, addr, nr);
	if (plan->run.kind != plan->page.kind) {
		plan->run.nr_pages = 0;
		return;
	}
	if (before)
		before = lp_space_lookback(space, &plan->run, before);
	plan->before = before;
	plan->run.addr -= before << LP_PAGE_SHIFT;
	plan->run.dump_addr -= before << LP_PAGE_SHIFT;
	plan->run.offset -= before << LP_PAGE_SHIFT;
	plan->run.index -= before;
	plan->run.nr_pages += before;
}

struct lp_plan lp_plan_fault(const struct lp_space *space, struct lp_readahead *readahead, const struct lp_ranges *unsure,
			     uint64_t addr)
{
	struct lp_run page = lp_space_lookup(space, addr, 1);
	struct lp_plan plan = {.page = page, .run = page};

	switch (page.kind) {
	case LP_ZERO:
		plan.action = lp_ranges_meet(unsure, addr, addr + LP_PAGE_SIZE) ? LP_PLAN_REFUSE : LP_PLAN_ZERO;
		break;
	case LP_DATA:
	case LP_REMOTE:
		plan.action = page.kind == LP_DATA ? LP_PLAN_COPY : LP_PLAN_ASK;
		widen(&plan, space, lp_readahead_fault(readahead, addr >> LP_PAGE_SHIFT));
		break;
	case LP_CLAIMED:
		plan.action = page.source == LP_SOURCE_REMOTE ? LP_PLAN_ESCALATE : LP_PLAN_DEFER;
		break;
	default:
		plan.action = LP_PLAN_LOST;
		break;
	}
	return plan;
}
