#include "asking.h"

#include <errno.h>

#include "events.h"
#include "smaps.h"
#include "stats.h"
#include "wake.h"

/*
 * -ENOENT only when it is so while the layout is quiescent: the kernel looks for the mapping before it looks whether the layout is
 * changing.
 */
static int answer_when_quiescent(struct lp_task *t, struct lp_result result)
{
	if (result.outcome == LP_LATER ||
	    (result.outcome == LP_UNREGISTERED && lp_probe_page(t, LP_ANYWHERE) == LP_CHANGING))
		return -EAGAIN;
	if (result.outcome == LP_TASK_GONE)
		return -ESRCH;
	return result.error == EINVAL ? -ENOENT : -result.error; /* EINVAL: beyond all addresses */
}

static int ask_within(void *arg, uint64_t start, uint64_t end)
{
	struct lp_task *t = arg;

	return answer_when_quiescent(t, lp_uffd_probe_range(t->uffd, start, end));
}

static int ask_zero(void *arg, uint64_t addr)
{
	struct lp_task *t = arg;
	struct lp_result result = lp_uffd_zero(t->uffd, addr, false);

	if (result.outcome != LP_DONE)
		return answer_when_quiescent(t, result);
	lp_count(&t->stats.zero_pages, 1);
	return 0;
}

static bool ask_alike(void *arg, uint64_t edge, uint64_t start, uint64_t end)
{
	const struct lp_task *t = arg;

	return lp_mappings_alike(t->pid, t->pidfd, edge, start, end);
}

static bool ask_grows(void *arg, uint64_t addr)
{
	const struct lp_task *t = arg;

	return lp_mapping_grows(t->pid, t->pidfd, addr);
}

static bool ask_arrived(void *arg, uint64_t addr)
{
	const struct lp_task *t = arg;

	for (size_t i = 0; i < t->nr_changes; i++)
		if (t->changes[i].kind == LP_REMAPPED && t->changes[i].to <= addr && addr - t->changes[i].to < t->changes[i].len)
			return true;
	return false;
}

static bool ask_mapped(void *arg, uint64_t addr)
{
	const struct lp_task *t = arg;

	return lp_is_mapped(t->pid, t->pidfd, addr);
}

void lp_mark_range_lost(struct lp_task *t, uint64_t start, uint64_t end)
{
	struct lp_run run;

	for (; start < end; start += run.nr_pages << LP_PAGE_SHIFT) {
		run = lp_space_lookup(t->space, start, (end - start) >> LP_PAGE_SHIFT);
		if (run.kind == LP_ZERO)
			continue;
		lp_space_mark_lost_for_good(t->space, run.index, run.nr_pages);
		if (run.kind == LP_LOST)
			continue;
		if (!t->unreported_lost)
			lp_post_lost(t, &run, 0, run.nr_pages, EADDRNOTAVAIL);
		else if (!t->unreported_lost->nr_pages)
			*t->unreported_lost = run;
	}
}

static void range_stays(void *arg, uint64_t start, uint64_t end, bool known)
{
	struct lp_task *t = arg;

	if (!known)
		lp_mark_range_lost(t, start, end);
	lp_wake(t, start, (end - start) >> LP_PAGE_SHIFT);
}

struct lp_ask lp_asking(struct lp_task *t)
{
	return (struct lp_ask){t, ask_within, ask_zero, ask_alike, ask_grows, ask_arrived, ask_mapped, range_stays};
}
