#include "events.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "guard.h"
#include "task_trace.h"
#include "wakeup_fd.h"

static bool more_notices(struct lp_engine *e)
{
	size_t cap = e->cap_notices ? e->cap_notices * 2 : 64;
	struct lp_notice *more = realloc(e->notices, cap * sizeof(*more));

	if (!more)
		return false;
	e->notices = more;
	e->cap_notices = cap;
	return true;
}

/*
 * Called when there is no memory to queue a notice.  Kinds that come once for a task are kept as a bit.  Lost pages would never
 * be reported: then the task must not go on.  Only a request for pages can be made again: false.
 */
static bool post_without_memory(struct lp_engine *e, const struct lp_notice *notice)
{
	uint32_t kind = notice->kind;

	if (kind == LP_NOTICE_NEED || kind == LP_NOTICE_HURRY)
		return false;
	if (kind == LP_NOTICE_LOST) {
		kind = LP_NOTICE_BROKEN;
		atomic_store(&notice->task->broken, true);
	}
	notice->task->unposted |= 1u << kind;
	notice->task->unposted_error = kind == notice->kind ? notice->error : ENOMEM;
	e->any_unposted = true;
	return true;
}

bool lp_post(struct lp_engine *e, struct lp_notice notice)
{
	struct lp_notice *last;
	bool done = true;

	pthread_mutex_lock(&e->lock);
	if (notice.task->closed)
		goto out;
	last = e->nr_notices ? &e->notices[e->nr_notices - 1] : NULL;
	if (last && notice.kind == LP_NOTICE_LOST && last->kind == notice.kind && last->task == notice.task &&
	    last->error == notice.error && last->image + (last->nr_pages << LP_PAGE_SHIFT) == notice.image &&
	    last->addr + (last->nr_pages << LP_PAGE_SHIFT) == notice.addr) {
		last->nr_pages += notice.nr_pages;
		goto out;
	}
	if (e->nr_notices == e->cap_notices && !more_notices(e))
		done = post_without_memory(e, &notice);
	else
		e->notices[e->nr_notices++] = notice;
out:
	pthread_mutex_unlock(&e->lock);
	lp_wakeup(e->noticefd);
	return done;
}

/* Takes notices of these kinds that are kept as bits; returns how many. (lock held) */
static size_t take_unposted(struct lp_engine *e, uint32_t kinds, struct lp_notice *notices, size_t max)
{
	size_t nr = 0;

	for (struct lp_task *t = e->tasks; t; t = t->next)
		for (uint32_t kind = LP_NOTICE_FORKED; t->unposted && kind <= LP_NOTICE_UNSEEN && nr < max; kind++)
			if (t->unposted & kinds & 1u << kind) {
				t->unposted &= ~(1u << kind);
				notices[nr++] = (struct lp_notice){.kind = kind, .error = t->unposted_error, .task = t};
			}
	return nr;
}

size_t lp_engine_notices(struct lp_engine *e, struct lp_notice *notices, size_t max)
{
	size_t nr, first = 0;

	pthread_mutex_lock(&e->lock);
	lp_wakeup_clear(e->noticefd);
	/* a task is reported before anything about it is; all other bits come last in its life */
	if (e->any_unposted)
		first = take_unposted(e, 1u << LP_NOTICE_FORKED, notices, max);
	nr = e->nr_notices < max - first ? e->nr_notices : max - first;
	if (nr) {
		memcpy(notices + first, e->notices, nr * sizeof(*notices));
		memmove(e->notices, e->notices + nr, (e->nr_notices - nr) * sizeof(*notices));
		e->nr_notices -= nr;
	}
	nr += first;
	if (e->any_unposted && !e->nr_notices) {
		nr += take_unposted(e, ~0u, notices + nr, max - nr);
		e->any_unposted = nr == max; /* there may be more */
	}
	if (e->nr_notices || e->any_unposted)
		lp_wakeup(e->noticefd);
	pthread_mutex_unlock(&e->lock);
	return nr;
}

int lp_engine_notice_fd(const struct lp_engine *e)
{
	return e->noticefd;
}

void lp_post_about(struct lp_task *t, uint32_t kind, int error)
{
	lp_post(t->engine, (struct lp_notice){.kind = kind, .error = error, .task = t});
}

void lp_mark_gone(struct lp_task *t)
{
	if (atomic_exchange(&t->gone, true))
		return;
	lp_task_trace(t, LP_TRACE_GONE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	lp_post_about(t, LP_NOTICE_GONE, 0);
}

void lp_mark_broken(struct lp_task *t, int error)
{
	if (!atomic_exchange(&t->broken, true))
		lp_post_about(t, LP_NOTICE_BROKEN, error);
}

void lp_check_complete(struct lp_task *t)
{
	if (lp_space_pending(t->space) || atomic_load(&t->broken) || atomic_exchange(&t->complete, true))
		return;
	lp_guard_complete(t->engine->guard, t->uffd);
	lp_task_trace(t, LP_TRACE_COMPLETE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	lp_post_about(t, LP_NOTICE_COMPLETE, 0);
}

void lp_post_lost(struct lp_task *t, const struct lp_answer *run, uint64_t skip, uint64_t nr, int error)
{
	lp_task_trace(t, LP_TRACE_LOST, lp_trace_source(run->source), run->addr + (skip << LP_PAGE_SHIFT), nr, (uint64_t)error);
	lp_post(t->engine, (struct lp_notice){
				  .kind = LP_NOTICE_LOST,
				  .error = error,
				  .task = t,
				  .image = run->image + (skip << LP_PAGE_SHIFT),
				  .addr = run->addr + (skip << LP_PAGE_SHIFT),
				  .nr_pages = nr,
			  });
}

void lp_mark_lost(struct lp_task *t, const struct lp_answer *run, uint64_t skip, uint64_t nr, int error)
{
	lp_space_lose(t->space, run->dense + skip, nr);
	lp_post_lost(t, run, skip, nr, error);
}

bool lp_forget_posted(struct lp_task *t)
{
	struct lp_engine *e = t->engine;
	bool spoilt = t->unposted & 1u << LP_NOTICE_BROKEN;
	size_t kept = 0;

	for (size_t i = 0; i < e->nr_notices; i++) {
		if (e->notices[i].task != t)
			e->notices[kept++] = e->notices[i];
		else
			spoilt |= e->notices[i].kind == LP_NOTICE_LOST && e->notices[i].error == ESTALE;
	}
	e->nr_notices = kept;
	return spoilt;
}
