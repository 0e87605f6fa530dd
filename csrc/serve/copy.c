#include "copy.h"

#include <errno.h>
#include <stdlib.h>

#include "deferred.h"
#include "events.h"
#include "stats.h"
#include "wake.h"
#include "common/clock.h"

/* Pages of the run, from number `skip` on, can't be copied now. */
static void settle_claims(struct lp_task *t, const struct lp_run *run, uint64_t skip, enum lp_claims claims)
{
	if (claims != LP_KEEP_CLAIMS)
		lp_space_release(t->space, run->index + skip, run->nr_pages - skip);
	if (claims == LP_RELEASE_SHARED || claims == LP_RELEASE_QUIETLY)
		lp_claims_released(t);
}

/*
 * Copies a claimed run from src into the task (lock held shared).  Settles every page of it: committed, or lost, or as
 * `claims` says when it returns -EAGAIN (a layout event is under way).  0, -EAGAIN, -ESRCH.  The caller checks whether the
 * task is complete.
 */
static int copy_claimed(struct lp_task *t, const struct lp_run *run, const void *src, enum lp_claims claims)
{
	lp_counter *copied = &t->copied[lp_source_index(t, run->source)];
	uint64_t done = 0, step = run->nr_pages;
	bool quiet = claims == LP_RELEASE ? t->batching : claims == LP_RELEASE_QUIETLY;

	while (done < run->nr_pages) {
		uint64_t at = done << LP_PAGE_SHIFT, left = run->nr_pages - done, want = step < left ? step : left;
		struct lp_result result = lp_uffd_copy(t->uffd, run->addr + at, (const char *)src + at, want, quiet);

		lp_count(&t->stats.copies, 1);
		if (result.nr_pages) {
			lp_count(copied, result.nr_pages);
			lp_space_commit(t->space, run->index + done, result.nr_pages);
			if (quiet && claims == LP_RELEASE)
				lp_wake_batched(t, run->addr + at, result.nr_pages);
			done += result.nr_pages;
			if (result.outcome == LP_DONE)
				step *= 2; /* after a bisection: larger again */
			continue;
		}
		switch (result.outcome) {
		case LP_PRESENT: /* not our page, or a guard; a thread may wait for it all the same */
			lp_count(&t->stats.present, 1);
			lp_drop_pages(t, run, done, 1);
			if (claims == LP_RELEASE)
				lp_wake_batched(t, run->addr + at, 1);
			else
				lp_wake(t, run->addr + at, 1);
			done++;
			continue;
		case LP_TASK_GONE:
			lp_mark_gone(t);
			lp_space_release(t->space, run->index + done, left);
			return -ESRCH;
		case LP_CHANGING:
		case LP_LATER:
			settle_claims(t, run, done, claims);
			return -EAGAIN;
		default:
			/*
			 * ENOENT: the run is not within one registered VMA (mprotect and madvise split VMAs without an
			 * event).  EFAULT: bytes that can't be read, as past the end of a truncated file.  Halve until
			 * the page is found that can't be done.
			 */
			if (want > 1) {
				step = want / 2;
				continue;
			}
			/* The kernel looks for the VMA before it looks whether the layout is changing. */
			if (result.outcome == LP_UNREGISTERED && lp_probe_page(t, run->addr + at) == LP_CHANGING)
				continue;
			/*
			 * A page that a forked child has not: all that its parent had was registered, so another thread unmapped
			 * it while one forked; or it is not for children (MADV_DONTFORK).
			 */
			if (result.outcome == LP_UNREGISTERED && t->is_child)
				lp_drop_pages(t, run, done, 1);
			else
				lp_mark_lost(t, run, done, 1, result.error);
			done++;
		}
	}
	return 0;
}

struct lp_run lp_run_after(const struct lp_run *run, uint64_t skip)
{
	struct lp_run rest = *run;

	rest.addr += skip << LP_PAGE_SHIFT;
	rest.dump_addr += skip << LP_PAGE_SHIFT;
	rest.offset += skip << LP_PAGE_SHIFT;
	rest.index += skip;
	rest.nr_pages -= skip;
	return rest;
}

struct lp_guarded_task lp_guarded_task_of(const struct lp_task *t)
{
	return (struct lp_guarded_task){
		.owner = t, .pid = t->pid, .pidfd = t->pidfd, .uffd = t->uffd, .unreadable = t->engine->unreadable};
}

/*
 * As copy_claimed, but for guards (csrc/serve/guarded.h): those pages are dropped, since from the moment a guard is installed what was
 * there is gone, and when it is removed they are zero.  `touched`: a page on which a thread has just faulted, so that it is no
 * guard unless another thread has made it one meanwhile; on its own it is copied without a look, unless the task has guards.
 * look: the thread's, or NULL: what it copies next is elsewhere.
 */
static int copy_unguarded(struct lp_task *t, const struct lp_run *run, const void *src, enum lp_claims claims, uint64_t touched,
			  struct lp_look *look)
{
	struct lp_guarded *g = &t->engine->guarded;
	struct lp_guarded_task task = lp_guarded_task_of(t);
	uint64_t end = run->addr + (run->nr_pages << LP_PAGE_SHIFT), done = 0, now;
	int fd, rc = 0;

	if (!g->category || !t->pid)
		return copy_claimed(t, run, src, claims);
	if (atomic_load_explicit(&t->has_guards, memory_order_relaxed))
		look = NULL;
	else if (run->nr_pages == 1 && run->addr == touched)
		return copy_claimed(t, run, src, claims);
	now = look ? lp_now_ns() : 0;
	if (look && look->layout == t->layout && run->addr >= look->from && end <= look->to && now - look->at < LP_LOOK_NS)
		return copy_claimed(t, run, src, claims);
	fd = lp_guarded_take(g, &task);
	if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM) {
		settle_claims(t, run, 0, claims);
		return -EAGAIN;
	}
	if (fd < 0) {
		if (fd != -ESRCH && !atomic_exchange(&t->unseen, true))
			lp_post_about(t, LP_EVENT_UNSEEN, -fd);
		return copy_claimed(t, run, src, claims);
	}
	while (done < run->nr_pages && !rc) {
		struct lp_run part = lp_run_after(run, done);
		bool close = atomic_load_explicit(&t->has_guards, memory_order_relaxed);
		uint64_t until = close && end - part.addr > LP_LOOK_CLOSE ? part.addr + LP_LOOK_CLOSE : end, nr;
		uint64_t ahead = look && !close && end < part.addr + LP_LOOK_AHEAD ? part.addr + LP_LOOK_AHEAD : until;
		struct lp_range guard = {until, until};

		/*
		 * Ahead may be past all that a task can have; other errors don't matter: where there are no page tables there is
		 * nothing to copy to.
		 */
		if (lp_guarded_scan(fd, g->category, part.addr, ahead, &guard) && ahead > until)
			lp_guarded_scan(fd, g->category, part.addr, until, &guard);
		if (guard.start < guard.end && !close) {
			atomic_store_explicit(&t->has_guards, true, memory_order_relaxed);
			continue; /* closer */
		}
		if (look && !close)
			*look = (struct lp_look){part.addr, guard.start, now, t->layout};
		if (guard.start > until)
			guard.start = until;
		if (guard.end > until)
			guard.end = until;
		part.nr_pages = (guard.start - part.addr) >> LP_PAGE_SHIFT;
		if (part.nr_pages)
			rc = copy_claimed(t, &part, (const char *)src + (done << LP_PAGE_SHIFT), claims);
		done += part.nr_pages;
		nr = (guard.end - guard.start) >> LP_PAGE_SHIFT;
		if (rc || !nr)
			continue;
		if (!lp_is_quiescent(t)) { /* it may be the guard of what is there now */
			rc = -EAGAIN;
			continue;
		}
		lp_drop_pages(t, run, done, nr);
		lp_wake(t, guard.start, nr); /* threads that wait there: it was no guard then */
		done += nr;
	}
	lp_guarded_give(g, t, fd);
	if (rc)
		settle_claims(t, run, done, rc == -EAGAIN ? claims : LP_RELEASE);
	return rc;
}

int lp_copy_buffer(struct lp_task *t, const struct lp_run *run, const void *src, enum lp_claims claims)
{
	int rc = copy_unguarded(t, run, src, claims, LP_NO_PAGE, NULL);

	lp_check_complete(t);
	return rc;
}

/*
 * Reads a run that the mapping might make a thread wait for while more is read from a disk than it has asked for.  NULL: it is to be
 * copied from the mapping.  A page that can't be read is found there.
 */
static const void *read_cold(struct lp_engine *e, const struct lp_level *level, const struct lp_run *run, enum lp_claims claims)
{
	uint64_t begun, now;
	int64_t got;

	if (claims != LP_RELEASE || !lp_cold_expected(&e->cold) || run->nr_pages > LP_READ_PAGES)
		return NULL;
	begun = lp_now_ns();
	got = level->read(level, e->read_buffer, run->offset, run->nr_pages);
	now = lp_now_ns();
	lp_cold_read(&e->cold, now, now - begun, run->nr_pages);
	return got == (int64_t)run->nr_pages ? e->read_buffer : NULL;
}

int lp_copy_level(struct lp_task *t, const struct lp_run *run, enum lp_claims claims, uint64_t touched, struct lp_look *look)
{
	const struct lp_level *level = &t->levels[run->source];
	const void *read = read_cold(t->engine, level, run, claims);
	uint64_t held = read ? run->nr_pages : level->held(level, run->offset, run->nr_pages), still, around;
	struct lp_run part = *run;
	int rc = 0;

	if (held < run->nr_pages)
		lp_mark_lost(t, run, held, run->nr_pages - held, EFAULT);
	part.nr_pages = held;
	if (held)
		rc = copy_unguarded(t, &part, read ? read : (const char *)level->base + run->offset, claims, touched, look);
	around = read ? lp_cold_around(&t->engine->cold) : 0;
	if (around)
		level->around(level, run->offset, around); /* the thread that waited runs on already */
	still = read ? held : level->held(level, run->offset, held);
	if (still < held)
		lp_post_lost(t, run, still, 1, ESTALE);
	lp_check_complete(t);
	return rc;
}

int lp_zero_page(struct lp_task *t, uint64_t addr)
{
	struct lp_result result = lp_uffd_zero(t->uffd, addr, t->batching);

	if (result.outcome == LP_DONE) {
		lp_count(&t->stats.zero_pages, 1);
		if (t->batching)
			lp_wake_batched(t, addr, 1);
		return 0;
	}
	if (result.outcome == LP_TASK_GONE) {
		lp_mark_gone(t);
		return -ESRCH;
	}
	if (lp_may_pass(result.outcome))
		return -EAGAIN;
	if (result.outcome == LP_PRESENT)
		lp_count(&t->stats.present, 1);
	else if (result.outcome != LP_UNREGISTERED) /* else it is unmapped since; the thread finds out when it runs */
		lp_post_about(t, LP_EVENT_FAILED, result.error);
	lp_wake_batched(t, addr, 1);
	return 0;
}
