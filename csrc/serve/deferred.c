#include "deferred.h"

#include <errno.h>

#include "wake.h"
#include "wakeup_fd.h"

#define REVIEW_FROM 64 /* deferred faults: with more it is looked which of them still wait */

void lp_claims_released(struct lp_task *t)
{
	struct lp_engine *e = t->engine;

	if (atomic_exchange(&t->released, true))
		return;
	t->next_released = atomic_load(&e->released);
	while (!atomic_compare_exchange_weak(&e->released, &t->next_released, t))
		;
	lp_wakeup(e->wakefd);
}

void lp_collect_released(struct lp_engine *e)
{
	struct lp_task *t, *next;

	for (t = atomic_exchange(&e->released, NULL); t; t = next) {
		next = t->next_released;
		atomic_store(&t->released, false); /* from here on it may be in the list again */
		t->claims_released = true;
		lp_retry_later(t);
	}
}

void lp_retry_later(struct lp_task *t)
{
	if (!t->awaits_retry) {
		t->awaits_retry = true;
		t->next_retry = t->engine->retries;
		t->engine->retries = t;
	}
}

void lp_review_deferred(struct lp_task *t)
{
	bool was_released = t->claims_released;
	struct lp_range came = {0};

	t->claims_released = false;
	t->deferred_most = REVIEW_FROM;
	for (size_t nr = t->deferred.nr; nr; nr--) {
		struct lp_fault fault = lp_faults_pop(&t->deferred);
		struct lp_run run = lp_space_lookup(t->space, fault.addr, 1);

		/*
		 * Released by one thread and claimed by another, which may copy without a wake-up as it knows of no fault that
		 * has been deferred since: as in lp_defer_fault.
		 */
		if (was_released && run.kind == LP_CLAIMED) {
			lp_count(&t->nr_deferred, 1);
			atomic_thread_fence(memory_order_seq_cst);
			run = lp_space_lookup(t->space, fault.addr, 1);
		}
		if (run.kind == LP_ZERO) {
			if (came.start == came.end || fault.addr < came.start)
				came.start = fault.addr;
			if (fault.addr + LP_PAGE_SIZE > came.end)
				came.end = fault.addr + LP_PAGE_SIZE;
			continue;
		}
		if (run.kind != LP_CLAIMED) {
			if (lp_faults_push(&t->faults, fault))
				continue;
			t->claims_released = true; /* once there is memory */
			lp_retry_later(t);
		}
		lp_faults_push(&t->deferred, fault); /* there is room, that of the one taken out */
	}
	if (came.start < came.end)
		lp_wake_batched(t, came.start, (came.end - came.start) >> LP_PAGE_SHIFT);
	if (2 * t->deferred.nr > REVIEW_FROM)
		t->deferred_most = 2 * t->deferred.nr;
}

int lp_defer_fault(struct lp_task *t, struct lp_fault fault)
{
	if (!lp_faults_push(&t->deferred, fault))
		return -EAGAIN;
	lp_count(&t->nr_deferred, 1);
	atomic_thread_fence(memory_order_seq_cst); /* with that of bring_run */
	if (lp_space_lookup(t->space, fault.addr, 1).kind == LP_ZERO)
		lp_wake_batched(t, fault.addr, 1); /* it has come meanwhile */
	if (t->deferred.nr > t->deferred_most)
		lp_review_deferred(t);
	return 0;
}
