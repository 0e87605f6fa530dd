#include "fault.h"

#include <errno.h>

#include "common/clock.h"
#include "copy.h"
#include "deferred.h"
#include "events.h"
#include "fault_plan.h"
#include "stats.h"
#include "task_trace.h"
#include "wake.h"

/* How far the background is sent ahead of a thread that has caught up with it, bytes: the more often the further. */
#define LEAD_MIN ((uint64_t)1 << 20)
#define LEAD_MAX ((uint64_t)32 << 20)
#define LEAD_MEMORY_NS (LP_NS / 10) /* after that it begins with LEAD_MIN again */

/* Brings what waits in [addr, end), whatever lies between.  0, -EAGAIN, -ESRCH. */
static int bring(struct lp_task *t, uint64_t addr, uint64_t end)
{
	struct lp_run run;
	int rc = 0;

	for (; addr < end && !rc; addr += run.nr_pages << LP_PAGE_SHIFT) {
		run = lp_space_lookup(t->space, addr, (end - addr) >> LP_PAGE_SHIFT);
		if (run.kind != LP_DATA)
			continue;
		run.nr_pages = lp_space_claim(t->space, run.index, run.nr_pages);
		if (run.nr_pages)
			rc = lp_copy_level(t, &run, LP_RELEASE, LP_NO_PAGE, &t->look);
		else
			run.nr_pages = 1; /* another thread was faster */
	}
	return rc;
}

/*
 * A thread has caught up with the background: that goes on well ahead of it, or they would meet again at every chunk.
 * What lies between is for faults and their readahead; the background comes back to what then still waits.
 */
static void send_background_ahead(struct lp_task *t, const struct lp_fault *fault)
{
	if (fault->since - t->lead_set > LEAD_MEMORY_NS)
		t->lead = LEAD_MIN;
	else if (t->lead < LEAD_MAX)
		t->lead *= 2;
	t->lead_set = fault->since;
	atomic_store(&t->cursor, fault->addr + t->lead);
	atomic_fetch_add(&t->nr_leads, 1);
}

/* It is not known what the page holds.  Where the kernel has no poison the thread waits, and the task is reported broken. */
static int refuse_zeros(struct lp_task *t, uint64_t addr)
{
	struct lp_result result = lp_uffd_poison(t->uffd, addr, 1);

	if (result.outcome == LP_TASK_GONE) {
		lp_mark_gone(t);
		return -ESRCH;
	}
	if (lp_may_pass(result.outcome))
		return -EAGAIN;
	if (result.error == EINVAL) { /* Linux before 6.6 */
		lp_mark_broken(t, EADDRNOTAVAIL);
		return 0;
	}
	if (result.outcome != LP_DONE) /* a page is there, or nothing is mapped any more */
		lp_wake(t, addr, 1);
	else
		lp_count(&t->stats.poisoned, 1);
	lp_task_trace(t, LP_TRACE_POISONED, LP_TRACE_NO_SOURCE, addr, 1, 0);
	lp_post(t->engine, (struct lp_event){
				  .kind = LP_EVENT_LOST, .error = EADDRNOTAVAIL, .task = t, .addr = addr, .nr_pages = 1});
	return 0;
}

/* Claims the run: all of it, or from the page on.  False: another thread has the page. */
static bool claim_run(struct lp_task *t, const struct lp_plan *plan, struct lp_run *run)
{
	uint64_t got;

	*run = plan->run;
	if (!run->nr_pages)
		return false;
	got = lp_space_claim(t->space, run->index, run->nr_pages);
	if (plan->before && got <= plan->before) {
		lp_space_release(t->space, run->index, got);
		*run = lp_run_after(run, plan->before);
		got = lp_space_claim(t->space, run->index, run->nr_pages);
	}
	run->nr_pages = got;
	return got > 0;
}

static int place_zeros(struct lp_task *t, const struct lp_fault *fault)
{
	int rc = lp_zero_page(t, fault->addr);

	if (!rc) {
		lp_count(&t->stats.faults_zero, fault->times);
		lp_count_answered(t, fault->since, fault->times, LP_TRACE_ZERO, fault->addr, 1);
	}
	return rc;
}

static int copy_run(struct lp_task *t, const struct lp_plan *plan, const struct lp_fault *fault)
{
	struct lp_run run;
	uint64_t waited;
	int rc;

	if (!claim_run(t, plan, &run)) {
		lp_task_trace(t, LP_TRACE_LEFT, lp_trace_source(plan->page.source), fault->addr, 1, 0);
		return lp_defer_fault(t, *fault);
	}
	/* the rest of the window first: the thread would be back for it at once */
	rc = bring(t, plan->window.start, run.addr);
	if (!rc)
		rc = bring(t, run.addr + (run.nr_pages << LP_PAGE_SHIFT), plan->window.end);
	if (rc) {
		lp_space_release(t->space, run.index, run.nr_pages);
		return rc;
	}
	rc = lp_copy_level(t, &run, LP_RELEASE, fault->addr, &t->look);
	if (!rc) {
		lp_count(&t->stats.faults_served, fault->times);
		lp_count(&t->served[run.source], fault->times);
		waited = lp_count_answered(t, fault->since, fault->times, lp_trace_source(run.source), run.addr, run.nr_pages);
		lp_cold_waited(&t->engine->cold, fault->since + waited, waited);
	}
	return rc;
}

/* Reports what a thread waits for, if a channel does not bring it. */
static int report(struct lp_task *t, uint32_t kind, const struct lp_run *run, const struct lp_fault *fault)
{
	struct lp_event event = {
		.kind = kind,
		.task = t,
		.dump_addr = run->dump_addr,
		.addr = run->addr,
		.nr_pages = run->nr_pages,
		.since = fault->since,
	};

	return lp_post(t->engine, event) ? 0 : -EAGAIN;
}

static int ask(struct lp_task *t, const struct lp_plan *plan, const struct lp_fault *fault)
{
	uint64_t dump_addr = plan->page.dump_addr;
	struct lp_run run;
	int rc;

	if (!claim_run(t, plan, &run)) {
		lp_task_trace(t, LP_TRACE_LEFT, LP_TRACE_REMOTE, fault->addr, 1, 0);
		return 0;
	}
	lp_task_trace(t, LP_TRACE_WANTED, LP_TRACE_REMOTE, run.addr, run.nr_pages, run.dump_addr);
	lp_begin_wait(t, (struct lp_waiter){dump_addr, fault->since, run.addr, run.nr_pages});
	if (lp_channels_fault(&t->engine->channels, t->tag, run.dump_addr, run.nr_pages, fault->since))
		return 0;
	rc = report(t, LP_EVENT_NEED, &run, fault);
	if (rc) {
		lp_space_release(t->space, run.index, run.nr_pages);
		lp_end_wait(t, dump_addr, dump_addr + LP_PAGE_SIZE, false);
	}
	return rc;
}

static int escalate(struct lp_task *t, const struct lp_run *page, const struct lp_fault *fault)
{
	int rc;

	lp_task_trace(t, LP_TRACE_LEFT, LP_TRACE_REMOTE, fault->addr, 1, 0);
	lp_begin_wait(t, (struct lp_waiter){page->dump_addr, fault->since, page->addr, 1});
	if (lp_channels_escalate(&t->engine->channels, t->tag, page->dump_addr, fault->since))
		return 0;
	rc = report(t, LP_EVENT_ESCALATE, page, fault);
	if (rc)
		lp_end_wait(t, page->dump_addr, page->dump_addr + LP_PAGE_SIZE, false);
	return rc;
}

static int execute(struct lp_task *t, const struct lp_plan *plan, const struct lp_fault *fault)
{
	switch (plan->action) {
	case LP_PLAN_ZERO:
		return place_zeros(t, fault);
	case LP_PLAN_REFUSE:
		return refuse_zeros(t, fault->addr);
	case LP_PLAN_COPY:
		return copy_run(t, plan, fault);
	case LP_PLAN_ASK:
		return ask(t, plan, fault);
	case LP_PLAN_DEFER:
		lp_task_trace(t, LP_TRACE_LEFT, lp_trace_source(plan->page.source), fault->addr, 1, 0);
		send_background_ahead(t, fault);
		return lp_defer_fault(t, *fault);
	case LP_PLAN_ESCALATE:
		return escalate(t, &plan->page, fault);
	case LP_PLAN_LOST:
		break;
	}
	return report(t, LP_EVENT_LOST, &plan->page, fault);
}

int lp_answer_fault(struct lp_task *t, struct lp_fault fault)
{
	struct lp_plan plan = lp_plan_fault(t->space, &t->readahead, &t->unsure, fault.addr);

	if (plan.single)
		atomic_store_explicit(&t->engine->last_single, fault.since, memory_order_relaxed);
	return execute(t, &plan, &fault);
}
