#include "events.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "guard.h"
#include "task_trace.h"
#include "wakeup_fd.h"

static bool more_events(struct lp_engine *e)
{
	size_t cap = e->cap_events ? e->cap_events * 2 : 64;
	struct lp_event *more = realloc(e->events, cap * sizeof(*more));

	if (!more)
		return false;
	e->events = more;
	e->cap_events = cap;
	return true;
}

/*
 * Called when there is no memory to queue an event.  Kinds that come once for a task are kept as a bit.  Lost pages would never
 * be reported: then the task must not go on.  Only a request for pages can be made again: false.
 */
static bool post_without_memory(struct lp_engine *e, const struct lp_event *event)
{
	uint32_t kind = event->kind;

	if (kind == LP_EVENT_NEED || kind == LP_EVENT_ESCALATE)
		return false;
	if (kind == LP_EVENT_LOST) {
		kind = LP_EVENT_BROKEN;
		atomic_store(&event->task->broken, true);
	}
	event->task->unposted |= 1u << kind;
	event->task->unposted_error = kind == event->kind ? event->error : ENOMEM;
	e->any_unposted = true;
	return true;
}

bool lp_post(struct lp_engine *e, struct lp_event event)
{
	struct lp_event *last;
	bool done = true;

	pthread_mutex_lock(&e->lock);
	if (event.task->closed)
		goto out;
	last = e->nr_events ? &e->events[e->nr_events - 1] : NULL;
	if (last && event.kind == LP_EVENT_LOST && last->kind == event.kind && last->task == event.task &&
	    last->error == event.error && last->dump_addr + (last->nr_pages << LP_PAGE_SHIFT) == event.dump_addr &&
	    last->addr + (last->nr_pages << LP_PAGE_SHIFT) == event.addr) {
		last->nr_pages += event.nr_pages;
		goto out;
	}
	if (e->nr_events == e->cap_events && !more_events(e))
		done = post_without_memory(e, &event);
	else
		e->events[e->nr_events++] = event;
out:
	pthread_mutex_unlock(&e->lock);
	lp_wakeup(e->eventfd);
	return done;
}

/* Takes events of these kinds that are kept as bits; returns how many. (lock held) */
static size_t take_unposted(struct lp_engine *e, uint32_t kinds, struct lp_event *events, size_t max)
{
	size_t nr = 0;

	for (struct lp_task *t = e->tasks; t; t = t->next)
		for (uint32_t kind = LP_EVENT_FORKED; t->unposted && kind <= LP_EVENT_UNSEEN && nr < max; kind++)
			if (t->unposted & kinds & 1u << kind) {
				t->unposted &= ~(1u << kind);
				events[nr++] = (struct lp_event){.kind = kind, .error = t->unposted_error, .task = t};
			}
	return nr;
}

size_t lp_engine_events(struct lp_engine *e, struct lp_event *events, size_t max)
{
	size_t nr, first = 0;

	pthread_mutex_lock(&e->lock);
	lp_wakeup_clear(e->eventfd);
	/* a task is reported before anything about it is; all other bits come last in its life */
	if (e->any_unposted)
		first = take_unposted(e, 1u << LP_EVENT_FORKED, events, max);
	nr = e->nr_events < max - first ? e->nr_events : max - first;
	if (nr) {
		memcpy(events + first, e->events, nr * sizeof(*events));
		memmove(e->events, e->events + nr, (e->nr_events - nr) * sizeof(*events));
		e->nr_events -= nr;
	}
	nr += first;
	if (e->any_unposted && !e->nr_events) {
		nr += take_unposted(e, ~0u, events + nr, max - nr);
		e->any_unposted = nr == max; /* there may be more */
	}
	if (e->nr_events || e->any_unposted)
		lp_wakeup(e->eventfd);
	pthread_mutex_unlock(&e->lock);
	return nr;
}

int lp_engine_event_fd(const struct lp_engine *e)
{
	return e->eventfd;
}

void lp_post_about(struct lp_task *t, uint32_t kind, int error)
{
	lp_post(t->engine, (struct lp_event){.kind = kind, .error = error, .task = t});
}

void lp_mark_gone(struct lp_task *t)
{
	if (atomic_exchange(&t->gone, true))
		return;
	lp_task_trace(t, LP_TRACE_GONE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	lp_post_about(t, LP_EVENT_GONE, 0);
}

void lp_mark_broken(struct lp_task *t, int error)
{
	if (!atomic_exchange(&t->broken, true))
		lp_post_about(t, LP_EVENT_BROKEN, error);
}

void lp_check_complete(struct lp_task *t)
{
	if (lp_space_pending(t->space) || t->unsure.nr || atomic_load(&t->broken) || atomic_exchange(&t->complete, true))
		return;
	lp_guard_complete(t->engine->guard, t->uffd);
	lp_task_trace(t, LP_TRACE_COMPLETE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	lp_post_about(t, LP_EVENT_COMPLETE, 0);
}

void lp_post_lost(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr, int error)
{
	lp_task_trace(t, LP_TRACE_LOST, lp_trace_source(run->source), run->addr + (skip << LP_PAGE_SHIFT), nr, (uint64_t)error);
	lp_post(t->engine, (struct lp_event){
				  .kind = LP_EVENT_LOST,
				  .error = error,
				  .task = t,
				  .dump_addr = run->dump_addr + (skip << LP_PAGE_SHIFT),
				  .addr = run->addr + (skip << LP_PAGE_SHIFT),
				  .nr_pages = nr,
			  });
}

void lp_mark_lost(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr, int error)
{
	lp_space_mark_lost(t->space, run->index + skip, nr);
	lp_post_lost(t, run, skip, nr, error);
}

bool lp_forget_posted(struct lp_task *t)
{
	struct lp_engine *e = t->engine;
	bool spoilt = t->unposted & 1u << LP_EVENT_BROKEN;
	size_t kept = 0;

	for (size_t i = 0; i < e->nr_events; i++) {
		if (e->events[i].task != t)
			e->events[kept++] = e->events[i];
		else
			spoilt |= e->events[i].kind == LP_EVENT_LOST && e->events[i].error == ESTALE;
	}
	e->nr_events = kept;
	return spoilt;
}
