#define _GNU_SOURCE
#include "forks.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "asking.h"
#include "common/clock.h"
#include "copy.h"
#include "deferred.h"
#include "doubt.h"
#include "events.h"
#include "guard.h"
#include "read_events.h"
#include "stats.h"
#include "task.h"
#include "wake.h"
#include "wiped.h"

#define CHILD_TRIES 8	 /* for the layout of a child to be quiescent, before other tasks have their turn */
#define CHILD_NS (10 * LP_NS) /* after that what is not known of a child whose layout never is quiescent is lost */
#define POISON_TRIES 1000 /* for a page that takes the place of poison, which must not be seen */

/*
 * Whether a change that a child has made itself since the fork makes what it has registered no evidence about a change of its
 * parent: it has left a place that the parent's change has left or taken, or moved memory to a place that this has left.  Memory
 * that it moved to a place that the parent's change has taken hides nothing if the place that this has left is asked about, too;
 * after MREMAP_DONTUNMAP that stays registered, and only the place that was taken is evidence.
 */
static bool hides(const struct lp_fork *fork_events, const struct lp_change *own, const struct lp_change *made)
{
	if (own->kind == LP_FORKED || own->kind == LP_REMOVED || made->kind == LP_REMOVED) /* the child is not asked about REMOVE */
		return false;
	return lp_overlap(own->start, own->len, made->start, made->len) ||
	       (made->kind == LP_REMAPPED && lp_overlap(own->start, own->len, made->to, made->len)) ||
	       (own->kind == LP_REMAPPED && lp_overlap(own->to, own->len, made->start, made->len)) ||
	       (own->kind == LP_REMAPPED && made->kind == LP_REMAPPED && lp_overlap(own->to, own->len, made->to, made->len) &&
		!lp_leaves_source(fork_events->made, fork_events->nr_made, made));
}

/* Whether a child has changed its layout since the fork so that it does not show any more what it was forked with. */
static bool has_gone_on(const struct lp_task *child, const struct lp_fork *fork_events)
{
	for (size_t i = 0; i < child->nr_changes; i++)
		for (size_t k = 0; k < fork_events->nr_made; k++)
			if (hides(fork_events, &child->changes[i], &fork_events->made[k]))
				return true;
	return false;
}

static void mark_made_lost(struct lp_task *child, const struct lp_fork *fork_events)
{
	struct lp_range places[2];

	for (size_t i = 0; i < fork_events->nr_made; i++)
		for (size_t k = 0, n = lp_places(&fork_events->made[i], places); k < n; k++)
			lp_mark_range_lost(child, places[k].start, places[k].end);
}

static bool space_before(struct lp_task *t, struct lp_new_child *u)
{
	lp_space_free(u->task->space);
	u->lost.nr_pages = 0;
	memset(u->dropped.by_source, 0, (t->nr_levels + 2) * sizeof(uint64_t));
	u->task->space = lp_space_clone(t->fork.before, &u->dropped);
	return u->task->space;
}

/* Finds out what the child has, by asking the kernel: 0; -EAGAIN: its layout is changing; -ENOMEM. */
static int ask_child(struct lp_task *t, struct lp_new_child *u, uint64_t reported)
{
	const struct lp_ask of_child = lp_asking(u->task), of_parent = lp_asking(t);
	struct lp_fork *fork_events = &t->fork;
	bool again = u->asked;

	if (!space_before(t, u))
		return -ENOMEM;
	u->asked = true;
	return lp_replay(u->task->space, fork_events->made, fork_events->nr_made, reported, again, &of_child, &of_parent, &u->dropped,
			 &fork_events->tangled) ?
		       -EAGAIN :
		       0;
}

/* All that is pending in the child is lost. */
static int mark_all_lost(struct lp_task *t, struct lp_new_child *u)
{
	int rc = space_before(t, u) ? 0 : -ENOMEM;
	struct lp_task *child = u->task;

	if (rc)
		return rc;
	while (!rc && lp_space_nr_doubts(child->space))
		rc = lp_space_answer_doubt(child->space, 0, false, &u->dropped);
	for (size_t r = 0; r < lp_space_nr_regions(child->space); r++)
		lp_mark_range_lost(child, lp_space_regions(child->space)[r].start, lp_space_regions(child->space)[r].end);
	return rc;
}

/*
 * Makes the address space of a child, by what it has; u->dropped: what it has not.  If that can't be found out, all is lost.  0;
 * -EAGAIN: to be tried again; -ENOMEM.
 */
static int replay(struct lp_task *t, struct lp_new_child *u, uint64_t reported)
{
	struct lp_task *child = u->task;
	int rc = -EAGAIN;

	for (int tries = 0; rc == -EAGAIN && tries < CHILD_TRIES; tries++) {
		if (tries) {
			lp_read_events(child);
			sched_yield(); /* it may need this CPU */
		}
		if (lp_is_quiescent(child))
			rc = ask_child(t, u, reported);
	}
	if (rc == -EAGAIN && lp_now_ns() < u->until)
		return rc;
	if (rc == -EAGAIN) {
		t->fork.tangled = true;
		rc = mark_all_lost(t, u);
	} else if (!rc && has_gone_on(child, &t->fork)) {
		t->fork.tangled = true; /* what it has now is not what it was forked with */
		mark_made_lost(child, &t->fork);
	}
	/* faults again when it is served */
	while (child->faults.nr)
		lp_wake(child, lp_faults_pop(&child->faults).addr, 1);
	return rc;
}

static bool replaces_poison(struct lp_task *child, uint64_t addr, const void *src)
{
	for (int tries = 0; tries < POISON_TRIES; tries++) {
		enum lp_outcome outcome = lp_uffd_copy(child->uffd, addr, src, 1, false).outcome;

		if (outcome != LP_CHANGING)
			return outcome == LP_DONE;
		lp_read_events(child); /* its layout is changing already */
		sched_yield();
	}
	return false;
}

/*
 * A page where the parent has a guard by now: has the child one, too?  Poison is not placed over a guard (EEXIST).  Where it is
 * placed there was none when the process forked, and the page takes its place at once: the child does not run yet, or hardly.
 */
static void inherit_page(struct lp_task *child, const struct lp_run *page)
{
	const struct lp_level *level = &child->levels[page->source];
	struct lp_result poison;

	if (level->held(level, page->offset, 1) != 1 || !lp_space_claim(child->space, page->index, 1))
		return;
	poison = lp_uffd_poison(child->uffd, page->addr, 1);
	if (poison.outcome == LP_PRESENT) {
		lp_drop_pages(child, page, 0, 1);
	} else if (poison.outcome == LP_DONE &&
		   replaces_poison(child, page->addr, (const char *)level->base + page->offset)) {
		lp_count(&child->copied[page->source], 1);
		lp_space_commit(child->space, page->index, 1);
	} else {
		lp_space_release(child->space, page->index, 1); /* a copy over poison heals it */
	}
}

static void inherit_range(struct lp_task *child, struct lp_range guard)
{
	for (uint64_t addr = guard.start; addr < guard.end;) {
		struct lp_run run = lp_space_lookup(child->space, addr, (guard.end - addr) >> LP_PAGE_SHIFT);

		addr += run.nr_pages << LP_PAGE_SHIFT;
		for (uint64_t i = 0; run.kind == LP_DATA && i < run.nr_pages; i++) {
			struct lp_run page = lp_run_after(&run, i);

			inherit_page(child, &page);
		}
	}
}

/* A child has the guards that its parent had when it forked, and its process is not known: they are looked for in the parent. */
static void inherit_guards(struct lp_task *t, struct lp_task *child)
{
	struct lp_guarded *g = &t->engine->guarded;
	struct lp_guarded_task task = lp_guarded_task_of(t);
	size_t nr = lp_space_nr_regions(t->space);
	struct lp_range guard;
	int fd;

	if (!g->category || !t->pid || !nr || !lp_space_pending(child->space))
		return;
	fd = lp_guarded_take(g, &task);
	if (fd < 0)
		return;
	for (size_t r = 0; r < nr; r++) {
		uint64_t at = lp_space_regions(t->space)[r].start, end = lp_space_regions(t->space)[r].end;

		for (; !lp_guarded_scan(fd, g->category, at, end, &guard) && guard.start < guard.end; at = guard.end)
			inherit_range(child, guard);
	}
	lp_guarded_give(g, t, fd);
}

static bool any_matters(const struct lp_space *before, const struct lp_change *changes, size_t nr)
{
	struct lp_range places[2];

	for (size_t i = 0; i < nr; i++)
		for (size_t k = 0, n = lp_places(&changes[i], places); k < n; k++)
			if (lp_space_matters(before, places[k].start, places[k].end))
				return true;
	return false;
}

static bool inherit_unsure(const struct lp_task *t, struct lp_task *child, const struct lp_fork *fork_events)
{
	/* where nothing was missing, all that is missing is zero, whatever has moved */
	bool tangled = fork_events->before && fork_events->tangled &&
		       (t->unsure.nr || any_matters(fork_events->before, fork_events->made, fork_events->nr_made));
	struct lp_range places[2];

	for (size_t i = 0; i < t->unsure.nr; i++)
		if (!lp_ranges_include(&child->unsure, t->unsure.at[i].start, t->unsure.at[i].end))
			return false;
	for (size_t i = 0; i < fork_events->nr_made && tangled; i++)
		for (size_t k = 0, n = lp_places(&fork_events->made[i], places); k < n; k++)
			if (!lp_ranges_include(&child->unsure, places[k].start, places[k].end))
				return false;
	/* they are poisoned once it is quiescent; its owner does not know it, so its break would not be reported */
	return !child->unsure.nr || lp_try_append_change(child, (struct lp_change){.kind = LP_QUESTION});
}

/* NULL: no memory */
static struct lp_new_child *prepare_child(struct lp_task *t, struct lp_change *fork)
{
	struct lp_new_child *u = calloc(1, sizeof(*u));

	lp_count(&t->stats.forks, 1);
	lp_learn_wiped(t, fork->seen);
	fork->seen = NULL;
	if (!u) {
		lp_guard_leave(t->engine->guard, fork->uffd);
		return NULL;
	}
	u->until = lp_now_ns() + CHILD_NS;
	u->dropped = (struct lp_counts){calloc(t->nr_levels + 2, sizeof(uint64_t)), t->nr_levels};
	u->task = lp_task_alloc(t->engine, fork->uffd, t->nr_levels);
	if (!u->dropped.by_source || !u->task ||
	    (t->fork.before && lp_space_wipe_as(t->fork.before, t->space))) {
		lp_guard_leave(t->engine->guard, fork->uffd);
		lp_free_new_child(u);
		return NULL;
	}
	u->task->unreported_lost = &u->lost;
	u->task->tag = t->tag;
	return u;
}

/* It has its space. */
static void publish_child(struct lp_task *t, struct lp_new_child *u)
{
	struct lp_task *child = u->task;
	bool has_read;
	int rc;

	child->unreported_lost = NULL;
	child->read_error = 0;
	child->next_try = 0;
	child->total = lp_space_pending(child->space);
	for (uint32_t i = 0; i < t->nr_levels + 2; i++)
		child->total += u->dropped.by_source[i];
	lp_count_dropped(child, u->dropped.by_source);
	memcpy(child->levels, t->levels, t->nr_levels * sizeof(*t->levels));
	child->remote = t->remote;
	child->is_child = true;
	lp_number_memory(child, t->number);
	lp_readahead_init(&child->readahead, t->readahead.max_window);
	inherit_guards(t, child);
	/* these are the serving thread's from here on, which may be another one; and epoll does not name what has been read */
	has_read = child->nr_changes || child->faults.nr;
	lp_task_link(child); /* its owner, once it knows of it, may close it at once */
	/* reported before it is served, so that its first event comes after this one */
	lp_post(t->engine, (struct lp_event){.kind = LP_EVENT_FORKED, .task = child});
	if (u->lost.nr_pages)
		lp_post_lost(child, &u->lost, 0, u->lost.nr_pages, EADDRNOTAVAIL);
	rc = lp_task_start(child);
	if (rc)
		lp_post_about(child, LP_EVENT_FAILED, -rc);
	if (has_read)
		lp_claims_released(child);
}

bool lp_make_fork(struct lp_task *t, struct lp_change *fork)
{
	struct lp_fork *fork_events = &t->fork;
	struct lp_new_child *u = fork_events->child ? fork_events->child : prepare_child(t, fork);
	int rc = u ? 0 : -ENOMEM;

	fork_events->child = NULL;
	if (u && fork_events->before)
		rc = replay(t, u, fork->to);
	else if (u && !(u->task->space = lp_space_clone(t->space, &u->dropped)))
		rc = -ENOMEM;
	if (rc == -EAGAIN) {
		fork_events->child = u;
		return false;
	}
	if (rc || atomic_load(&t->broken) || !inherit_unsure(t, u->task, fork_events)) {
		lp_mark_broken(t, ENOMEM);
	} else {
		publish_child(t, u);
		u->task = NULL; /* the engine's */
	}
	lp_free_new_child(u);
	return true;
}
