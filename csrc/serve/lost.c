#include "engine.h"

#include <errno.h>
#include <stdlib.h>

#include "events.h"
#include "serving.h"
#include "stats.h"
#include "task_trace.h"
#include "wake.h"

/*
 * One range; pages that are there already count as done.  So do those that are not registered, for nothing can be done about
 * them; that is reported. Returns pages settled or -errno.
 */
static int64_t poison_range(struct lp_task *t, const struct lp_run *run)
{
	uint64_t done = 0, step = run->nr_pages;

	while (done < run->nr_pages) {
		uint64_t addr = run->addr + (done << LP_PAGE_SHIFT), left = run->nr_pages - done, nr = 1;
		uint64_t want = step < left ? step : left;
		struct lp_result result = lp_uffd_poison(t->uffd, addr, want);

		if (result.nr_pages) {
			nr = result.nr_pages;
			lp_count(&t->stats.poisoned, nr);
			lp_task_trace(t, LP_TRACE_POISONED, lp_trace_source(run->source), addr, nr, 0);
			if (result.outcome == LP_DONE)
				step *= 2;
		} else if (result.outcome == LP_UNREGISTERED && want > 1) {
			/* more than one VMA */
			step = want / 2;
			continue;
		} else if (result.outcome == LP_UNREGISTERED) {
			if (lp_probe_page(t, addr) == LP_CHANGING)
				return -EAGAIN;
			if (run->kind != LP_LOST)
				lp_mark_lost(t, run, done, 1, ENOENT);
		} else if (result.outcome == LP_PRESENT) {
			lp_wake(t, addr, 1);
		} else if (result.outcome == LP_LATER) {
			return -EAGAIN;
		} else {
			if (result.outcome == LP_TASK_GONE)
				lp_mark_gone(t);
			return -result.error;
		}
		lp_space_commit(t->space, run->index + done, nr);
		done += nr;
	}
	return (int64_t)done;
}

int64_t lp_task_poison(struct lp_task *t, bool all)
{
	int64_t total = 0, rc = 0;

	lp_lock_alone(&t->lock);
	if (t->uffd >= 0 && atomic_load(&t->broken))
		rc = -ESRCH; /* what there is to poison is not known */
	else if (t->uffd >= 0 && t->nr_changes)
		rc = -EAGAIN; /* what is lost may be elsewhere by now */
	for (size_t r = 0; t->uffd >= 0 && rc >= 0 && r < lp_space_nr_regions(t->space); r++) {
		struct lp_region region = lp_space_regions(t->space)[r];

		while (region.start < region.end) {
			struct lp_run run = lp_space_lookup(t->space, region.start,
							       (region.end - region.start) >> LP_PAGE_SHIFT);

			region.start += run.nr_pages << LP_PAGE_SHIFT;
			if (run.kind == LP_ZERO || (!all && run.kind != LP_LOST))
				continue;
			rc = poison_range(t, &run);
			if (rc < 0)
				break;
			total += rc;
		}
	}
	lp_check_complete(t);
	lp_unlock_alone(&t->lock);
	return rc < 0 ? rc : total;
}

void lp_task_forget(struct lp_task *t, uint64_t dump_addr, uint64_t nr_pages)
{
	struct lp_counts dropped = {.nr_levels = t->nr_levels};
	uint64_t addr;

	dropped.by_source = calloc(t->nr_levels + 2, sizeof(uint64_t));
	if (!dropped.by_source)
		return; /* they stay lost: the task waits */
	lp_lock_alone(&t->lock);
	lp_space_forget(t->space, dump_addr, nr_pages, &dropped);
	lp_count_dropped(t, dropped.by_source);
	lp_space_index(t->space);
	for (uint64_t i = 0; t->uffd >= 0 && i < nr_pages; i++)
		if (lp_space_locate(t->space, dump_addr + (i << LP_PAGE_SHIFT), &addr))
			lp_wake(t, addr, 1);
	lp_check_complete(t);
	lp_unlock_alone(&t->lock);
	free(dropped.by_source);
}

int lp_task_probe(struct lp_task *t)
{
	enum lp_outcome outcome;

	/* alone: what has just arrived is accounted for before its task is found gone */
	lp_lock_alone(&t->lock);
	outcome = t->uffd < 0 ? LP_TASK_GONE : lp_probe_page(t, LP_ANYWHERE);
	if (outcome == LP_TASK_GONE)
		lp_mark_gone(t);
	lp_unlock_alone(&t->lock);
	if (outcome == LP_TASK_GONE)
		return -ESRCH;
	return outcome == LP_CHANGING ? -EAGAIN : 0;
}
