#include "wake.h"

#include "uffd_ops.h"

void lp_wake(struct lp_task *t, uint64_t addr, uint64_t nr_pages)
{
	lp_count(&t->stats.wakes, 1);
	lp_uffd_wake(t->uffd, addr, nr_pages);
}

void lp_wake_batched(struct lp_task *t, uint64_t addr, uint64_t nr_pages)
{
	uint64_t end = addr + (nr_pages << LP_PAGE_SHIFT);

	if (!t->batching) {
		lp_wake(t, addr, nr_pages);
		return;
	}
	if (t->to_wake.start == t->to_wake.end)
		t->to_wake = (struct lp_range){addr, end};
	if (addr < t->to_wake.start)
		t->to_wake.start = addr;
	if (end > t->to_wake.end)
		t->to_wake.end = end;
}

void lp_wake_flush(struct lp_task *t)
{
	if (t->to_wake.start < t->to_wake.end)
		lp_wake(t, t->to_wake.start, (t->to_wake.end - t->to_wake.start) >> LP_PAGE_SHIFT);
	t->to_wake = (struct lp_range){0};
}
