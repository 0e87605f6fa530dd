#include "layout.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "asking.h"
#include "doubt.h"
#include "events.h"
#include "forks.h"
#include "guard.h"
#include "late.h"
#include "old_length.h"
#include "read_events.h"
#include "stats.h"
#include "task.h"
#include "task_trace.h"
#include "uffd_ops.h"
#include "wake.h"
#include "wiped.h"

/* Reads before giving up on a quiescent layout: a thread whose event has been read must run first, which takes some 50 us. */
#define QUIESCENT_TRIES 32

/* Applies one change to the address space.  False: it has to wait. */
static bool make_change(struct lp_task *t, struct lp_change *change)
{
	uint64_t counters[16] = {0};
	uint64_t *by_source = t->nr_levels + 2 <= 16 ? counters : calloc(t->nr_levels + 2, sizeof(uint64_t));
	struct lp_counts dropped = {by_source, t->nr_levels};
	uint64_t end = change->start + change->len;
	int rc = by_source ? 0 : -ENOMEM;
	bool made = true;

	if (rc && change->kind == LP_FORKED && !t->fork.child) { /* the child is not served: its uffd stays open; lp_free_fork's else */
		lp_guard_leave(t->engine->guard, change->uffd);
		lp_free_wiped(change->seen);
	}
	if (rc || change->kind == LP_QUESTION)
		goto out;
	t->layout++;
	switch (change->kind) {
	case LP_FORKED:
		made = lp_make_fork(t, change);
		if (!made)
			goto out;
		break;
	case LP_REMOVED:
		lp_count(&t->stats.removes, 1);
		lp_space_remove(t->space, change->start, end, &dropped);
		break;
	case LP_UNMAPPED:
		lp_count(&t->stats.unmaps, 1);
		rc = lp_space_matters(t->space, change->start, end) ?
			     lp_space_question(t->space, change->start, end) :
			     lp_space_unmap(t->space, change->start, end, &dropped);
		break;
	case LP_REMAPPED:
		lp_count(&t->stats.remaps, 1);
		rc = lp_space_remap(t->space, change->start, change->to, change->len, &dropped);
		if (!rc && lp_ranges_meet(&t->unsure, change->start, end) &&
		    !lp_ranges_include(&t->unsure, change->to, change->to + change->len))
			rc = -ENOMEM;
		break;
	}
	lp_task_trace(t, LP_TRACE_FORKED + change->kind, LP_TRACE_NO_SOURCE, change->start, change->len >> LP_PAGE_SHIFT,
	      change->kind == LP_REMAPPED ? change->to : 0);
	if (change->kind != LP_FORKED)
		lp_wake(t, change->start, change->len >> LP_PAGE_SHIFT);
	lp_count_dropped(t, by_source);
out:
	if (by_source != counters)
		free(by_source);
	if (rc)
		lp_mark_broken(t, -rc); /* the layout is not known, so any page could be placed wrongly */
	return made;
}

/* Whether the changes include a fork and a change whose order relative to the fork matters. */
static bool needs_history(const struct lp_task *t)
{
	bool forks = false, others = lp_space_nr_doubts(t->space);

	for (size_t i = 0; i < t->nr_changes; i++) {
		forks |= t->changes[i].kind == LP_FORKED;
		others |= t->changes[i].kind == LP_REMAPPED || t->changes[i].kind == LP_REMOVED ||
			  (t->changes[i].kind == LP_UNMAPPED &&
			   lp_space_matters(t->space, t->changes[i].start, t->changes[i].start + t->changes[i].len));
	}
	return forks && others;
}

/* Marks the ranges with an unclear order of departures lost (csrc/serve/late.h): they get neither pages nor zeros. */
static void mark_unclear_lost(struct lp_task *t)
{
	bool *unclear = malloc(t->nr_changes + 1);
	int found = unclear ? lp_unclear(t->space, t->changes, t->nr_changes, unclear) : -ENOMEM;
	struct lp_range places[2];
	bool matters = false; /* otherwise all missing pages there are zero in either order */

	for (size_t i = 0; i < t->nr_changes && found > 0; i++)
		for (size_t k = 0, n = unclear[i] ? lp_places(&t->changes[i], places) : 0; k < n; k++)
			matters |= lp_space_matters(t->space, places[k].start, places[k].end) ||
				   lp_ranges_meet(&t->unsure, places[k].start, places[k].end);
	for (size_t i = 0; i < t->nr_changes && found > 0 && matters; i++)
		for (size_t k = 0, n = unclear[i] ? lp_places(&t->changes[i], places) : 0; k < n; k++) {
			lp_mark_range_lost(t, places[k].start, places[k].end);
			lp_space_mark_doubts_lost(t->space, places[k].start, places[k].end);
			if (!lp_ranges_include(&t->unsure, places[k].start, places[k].end))
				found = -ENOMEM;
		}
	if (found < 0)
		lp_mark_broken(t, -found);
	free(unclear);
}

static void begin_history(struct lp_task *t)
{
	struct lp_fork *fork_events = &t->fork;

	fork_events->made = calloc(t->nr_changes, sizeof(*fork_events->made));
	fork_events->before = lp_space_copy(t->space);
	if (!fork_events->made || !fork_events->before)
		lp_mark_broken(t, ENOMEM);
}

/* Probes what the unmaps have removed.  If the layout is no longer quiescent, an LP_QUESTION stays: no fault is answered. */
static void settle(struct lp_task *t)
{
	struct lp_counts dropped = {calloc(t->nr_levels + 2, sizeof(uint64_t)), t->nr_levels};
	const struct lp_ask ask = lp_asking(t);
	int rc = -ENOMEM;

	if (dropped.by_source) {
		rc = lp_settle(t->space, &ask, &dropped);
		lp_count_dropped(t, dropped.by_source);
	}
	if (rc)
		lp_append_change(t, (struct lp_change){.kind = LP_QUESTION});
	free(dropped.by_source);
}

#define POISON_STEPS 4096 /* before other tasks have their turn */

/*
 * Poisons the missing pages of the unsure ranges, except those with known data: memory that has come there since.  Faults in the
 * ranges are refused only while the task is served; poison stays after that, and moves with the memory.  If the layout is no longer
 * quiescent, an LP_QUESTION stays pending, as above.
 */
static void poison_unsure(struct lp_task *t)
{
	for (int steps = 0; t->unsure.nr && !atomic_load(&t->broken); steps++) {
		struct lp_range *range = &t->unsure.at[t->unsure.nr - 1];
		uint64_t nr = (range->end - range->start) >> LP_PAGE_SHIFT, end = range->end;
		struct lp_result result;
		struct lp_run run;

		if (range->start >= range->end) {
			t->unsure.nr--;
			continue;
		}
		if (steps == POISON_STEPS) {
			lp_append_change(t, (struct lp_change){.kind = LP_QUESTION});
			return;
		}
		run = lp_space_lookup(t->space, range->start, nr);
		nr = run.nr_pages;
		if (run.kind != LP_ZERO && run.kind != LP_LOST) { /* memory that has come there since */
			range->start += nr << LP_PAGE_SHIFT;
			continue;
		}
		result = lp_uffd_poison(t->uffd, range->start, nr);
		if (result.nr_pages) {
			lp_count(&t->stats.poisoned, result.nr_pages);
			lp_task_trace(t, LP_TRACE_POISONED, LP_TRACE_NO_SOURCE, range->start, result.nr_pages, 0);
			lp_post(t->engine, (struct lp_event){.kind = LP_EVENT_LOST,
							     .error = EADDRNOTAVAIL,
							     .task = t,
							     .addr = range->start,
							     .nr_pages = result.nr_pages});
			range->start += result.nr_pages << LP_PAGE_SHIFT;
		} else if (result.outcome == LP_TASK_GONE) {
			lp_mark_gone(t);
			return;
		} else if (result.error == EINVAL && lp_probe_page(t, range->start) != LP_UNREGISTERED) {
			lp_mark_broken(t, EADDRNOTAVAIL); /* Linux before 6.6 has no poison */
		} else if (result.error == EINVAL && lp_probe_page(t, LP_ANYWHERE) != LP_CHANGING) {
			range->start += LP_PAGE_SIZE;
		} else if (result.outcome == LP_PRESENT ||
			   (result.outcome == LP_UNREGISTERED && nr == 1 && lp_probe_page(t, LP_ANYWHERE) != LP_CHANGING)) {
			lp_wake(t, range->start, 1);
			range->start += LP_PAGE_SIZE;
		} else if (result.outcome == LP_UNREGISTERED && nr > 1) { /* not all in one mapping: try the halves */
			range->end = range->start + (nr / 2 << LP_PAGE_SHIFT);
			if (!lp_ranges_include(&t->unsure, range->end, end))
				lp_mark_broken(t, ENOMEM);
		} else {
			lp_append_change(t, (struct lp_change){.kind = LP_QUESTION});
			return;
		}
	}
}

void lp_make_changes(struct lp_task *t, bool quiescent)
{
	struct lp_change *changes = t->changes;
	size_t nr = t->nr_changes, next;
	struct lp_fork *fork_events = &t->fork;

	if (quiescent && !fork_events->child) {
		for (size_t i = 0; i < nr; i++)
			if (changes[i].kind == LP_REMAPPED) {
				if (lp_reports_old_length())
					lp_true_lengths(changes, nr);
				mark_unclear_lost(t);
				break;
			}
		if (needs_history(t))
			begin_history(t);
	}
	while (nr && !atomic_load(&t->broken) &&
	       (next = fork_events->child ? 0 : lp_space_next_change(t->space, changes, nr, quiescent)) < nr) {
		struct lp_change change = changes[next];

		memmove(&changes[1], changes, next * sizeof(change));
		if (!make_change(t, &change)) {
			changes[0] = change;
			break;
		}
		changes++;
		nr--;
		if (fork_events->before)
			fork_events->made[fork_events->nr_made++] = change;
	}
	if (!fork_events->child)
		lp_free_fork(fork_events);
	if (nr == t->nr_changes)
		return;
	memmove(t->changes, changes, nr * sizeof(*changes));
	t->nr_changes = nr;
	if (quiescent && !fork_events->child && !atomic_load(&t->broken)) {
		lp_space_quiescent(t->space);
		if (lp_space_nr_doubts(t->space))
			settle(t);
		if (!t->nr_changes)
			poison_unsure(t);
	}
	if (t->remote)
		lp_space_index(t->space);
	if (!fork_events->child)
		lp_check_complete(t);
}

void lp_catch_up(struct lp_task *t)
{
	enum lp_outcome outcome = LP_CHANGING;

	if (t->fork.child) {
		lp_make_changes(t, true); /* these were read while the layout was quiescent */
		if (t->fork.child)
			return;
		lp_watch(t, true);
	}
	for (int tries = 0; outcome == LP_CHANGING; tries++) {
		bool all = lp_read_events(t);

		lp_make_changes(t, false);
		if (!all || !t->nr_changes || tries == QUIESCENT_TRIES)
			return;
		outcome = lp_probe_page(t, LP_ANYWHERE);
		if (outcome == LP_CHANGING)
			sched_yield(); /* the threads that change the layout may need this CPU */
	}
	if (outcome == LP_TASK_GONE)
		lp_mark_gone(t);
	lp_make_changes(t, true);
	if (t->fork.child)
		lp_watch(t, false); /* the uffd may be readable; the task is tried again later */
}
