#include "serve_task.h"

#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>

#include "common/clock.h"
#include "deferred.h"
#include "fault.h"
#include "layout.h"
#include "task_trace.h"
#include "wake.h"

/*
 * With this many faults at once they are answered in the order of their addresses, and threads are woken for BATCH answers together
 * (csrc/serve/wake.h).
 */
#define CROWD 64
#define BATCH 64
#define SERVE_TRIES 4 /* for a task whose layout is changing, before other tasks have their turn */

/* Faults that can't be answered yet; all but `before` of them are new. */
static void postpone(struct lp_task *t, size_t before)
{
	struct lp_faults *f = &t->faults;
	size_t new = f->nr > before ? f->nr - before : 0;

	for (size_t n = f->nr - new; n < f->nr; n++) {
		lp_count(&t->stats.retried, lp_faults_at(f, n)->times);
		lp_task_trace(t, LP_TRACE_PUT_OFF, LP_TRACE_NO_SOURCE, lp_faults_at(f, n)->addr, 1, 0);
	}
	lp_retry_later(t);
}

/* Answers what has been read (lock held shared).  One EAGAIN means that all would get it now: it is about the layout of the task. */
static void answer_all(struct lp_task *t, size_t before)
{
	struct lp_faults *f = &t->faults;
	size_t answered_here = 0;
	int rc = 0;

	if (f->nr >= CROWD)
		atomic_store_explicit(&t->last_crowd, lp_now_ns(), memory_order_relaxed);
	while (f->nr && rc != -EAGAIN) {
		struct lp_fault fault;

		/* only after an answer: sorting is in vain while the layout is changing */
		if (answered_here == 1 && f->nr >= CROWD) {
			lp_faults_sort(f, t->sweep);
			t->batching = true;
		}
		if (t->batching && answered_here % BATCH == 0)
			lp_wake_flush(t);
		fault = lp_faults_pop(f);
		rc = lp_answer_fault(t, fault);
		if (rc == -EAGAIN)
			/* to the end: the reason may be another, which the other faults don't have.  There is room, its own */
			lp_faults_push(f, fault);
		else
			answered_here++;
		if (t->batching)
			t->sweep = fault.addr + LP_PAGE_SIZE;
	}
	if (t->batching)
		lp_wake_flush(t);
	t->batching = false;
	if (answered_here)
		t->engine->retry_ns = LP_RETRY_FIRST_NS;
	if (f->nr)
		postpone(t, before > answered_here ? before - answered_here : 0);
}

/* Reads and answers all; false when something could not be answered yet. */
static bool serve_once(struct lp_task *t)
{
	size_t before = t->faults.nr;
	uint64_t since;

	lp_lock_alone(&t->lock);
	if (lp_is_served(t))
		lp_catch_up(t);
	if (!lp_is_served(t)) {
		if (t->uffd >= 0) /* it stays readable */
			epoll_ctl(t->engine->epfd, EPOLL_CTL_DEL, t->uffd, NULL);
		lp_unlock_alone(&t->lock);
		return true;
	}
	if (t->read_error || t->nr_changes) {
		postpone(t, before);
		if (!t->read_error) {
			t->pause = t->pause ? 2 * t->pause : LP_RETRY_FIRST_NS;
			if (t->pause > LP_RETRY_MOST_NS)
				t->pause = LP_RETRY_MOST_NS;
			t->next_try = lp_now_ns() + t->pause;
		}
		lp_unlock_alone(&t->lock);
		return false;
	}
	t->pause = 0;
	if (t->claims_released || t->deferred.nr)
		lp_review_deferred(t);
	if (!t->faults.nr) {
		lp_unlock_alone(&t->lock);
		return true;
	}
	lp_lock_downgrade(&t->lock);
	if (t->engine->ready == 1 && t->faults.nr == 1 && !before)
		lp_follow_yield(&t->engine->follow, lp_faults_at(&t->faults, 0)->since);
	else
		lp_follow_insist(&t->engine->follow);
	since = t->faults.nr > before ? lp_faults_at(&t->faults, before)->since : 0;
	answer_all(t, before);
	lp_unlock_shared(&t->lock);
	if (since)
		lp_follow_fault(&t->engine->follow, t->pid, since, t->engine->ready);
	return !t->faults.nr;
}

void lp_serve(struct lp_task *t)
{
	for (int tries = 0; tries < SERVE_TRIES && !serve_once(t) && !t->read_error; tries++)
		sched_yield(); /* the thread that changes the layout is done soon, and may need this CPU */
}
