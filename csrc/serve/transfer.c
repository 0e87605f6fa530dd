#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <time.h>

#include "common/clock.h"
#include "copy.h"
#include "deferred.h"
#include "events.h"
#include "task_trace.h"
#include "wake.h"

#define CHUNK_QUIET (512u << 10) /* bytes a background copy takes at a time */
#define CHUNK_BUSY (64u << 10)	 /* the same while tasks fault: a fault waits for this at most */
#define CHUNK_SINGLE (8u << 10)	 /* the same while faults bring one page each, here and there */
#define BUSY_NS (2 * LP_NS / 1000) /* how long after a fault tasks count as faulting */

/* The range that one thread of the background has to itself: what one page table maps, whose lock is taken for each page. */
#define STRIPE ((uint64_t)2 << 20)
#define PREFETCHED 8 /* levels of a chain for which a thread of the background remembers what it has prefetched */
#define ASIDE_NS (5 * LP_NS / 1000) /* how long after a fault the background leaves its CPU to threads that fault */
#define ASIDE_TRIES 4 /* for another CPU, ASIDE_NS apart */

/*
 * How long after a layout event the background leaves room for the next: one thread, with pauses.  A layout change takes
 * a rwsem of the uffd for writing that every copy takes for reading (map_changing_lock, Linux 6.9 and later), and readers that
 * follow each other keep a writer waiting for 4 ms (kernel/locking/rwsem.c, RWSEM_WAIT_TIMEOUT).
 */
#define CHANGING_NS (5 * LP_NS / 1000)
#define CHANGING_PAUSE_NS 50000
#define LOOKAHEAD_TRIES 8 /* runs that another thread may claim before we do */
#define CROWD_NS (2 * LP_NS / 1000) /* how long after many faults at once the background does not wake without need */

/* How much the background copies at a time: the serving thread needs the lock alone to read faults, and waits for it. */
static uint64_t chunk(struct lp_engine *e)
{
	uint64_t now = lp_now_ns();

	if (now - atomic_load_explicit(&e->last_single, memory_order_relaxed) < BUSY_NS)
		return CHUNK_SINGLE;
	if (now - atomic_load_explicit(&e->last_fault, memory_order_relaxed) < BUSY_NS)
		return CHUNK_BUSY;
	return CHUNK_QUIET;
}

/*
 * Claims and copies a run of the background (lock held shared).  While there are many faults the copy wakes no thread: a fault
 * on one of these pages has been deferred to us since we claimed it, or the serving thread has still to read it, will find the
 * page there, and wakes.
 */
static int bring_run(struct lp_task *t, struct lp_run *run, struct lp_look *look)
{
	bool quietly = lp_now_ns() - atomic_load_explicit(&t->last_crowd, memory_order_relaxed) < CROWD_NS;
	uint64_t begun = lp_task_trace_begin(t), nr_deferred = atomic_load(&t->nr_deferred);
	int rc;

	run->nr_pages = lp_space_claim(t->space, run->index, run->nr_pages);
	if (!run->nr_pages)
		return 0;
	rc = lp_copy_level(t, run, quietly ? LP_RELEASE_QUIETLY : LP_RELEASE_SHARED, LP_NO_PAGE, look);
	atomic_thread_fence(memory_order_seq_cst); /* with that of lp_defer_fault: it sees the commit, or we its fault */
	if (quietly && atomic_load(&t->nr_deferred) != nr_deferred)
		lp_wake(t, run->addr, run->nr_pages);
	if (!rc)
		lp_task_trace_took(t, begun, LP_TRACE_BROUGHT, lp_trace_source(run->source), run->addr, run->nr_pages);
	return rc;
}

/* Where one thread of the background is, and how far it goes on from there. */
struct stripe {
	uint64_t at, end;
	uint32_t leads;
	struct lp_look look;
	struct {
		uint32_t level; /* whose bytes [from, to) are prefetched */
		uint64_t from, to;
	} prefetched[PREFETCHED]; /* by level: the levels of a chain may take turns page by page */
};

/*
 * Has what is copied next mapped, and read from the disk, with no lock held that a fault would wait for.  A copy that finds a source
 * page not mapped begins twice (mm/userfaultfd.c, mfill_atomic).
 */
static void prefetch(const struct lp_task *t, struct stripe *s, const struct lp_run *run)
{
	const struct lp_level *level = &t->levels[run->source];
	uint64_t left = level->size - run->offset, size = left < STRIPE ? left : STRIPE;
	uint32_t i = run->source % PREFETCHED;

	s->prefetched[i].level = run->source;
	s->prefetched[i].from = run->offset;
	s->prefetched[i].to = run->offset + size;
	level->prefetch(level, run->offset, size);
}

static bool is_prefetched(const struct stripe *s, const struct lp_run *run)
{
	uint32_t i = run->source % PREFETCHED;

	return run->source == s->prefetched[i].level && run->offset >= s->prefetched[i].from && run->offset < s->prefetched[i].to;
}

/* The next run of this thread's pages, in a new stripe if need be (lock held shared). False when nothing waits behind the cursor. */
static bool next_run(struct lp_task *t, struct stripe *s, uint64_t max_pages, struct lp_run *run)
{
	if (s->at < s->end && s->leads == atomic_load(&t->nr_leads) && lp_space_next(t->space, s->at, max_pages, false, run) &&
	    run->addr < s->end)
		goto out;
	for (;;) {
		uint64_t cursor;

		s->leads = atomic_load(&t->nr_leads);
		cursor = atomic_load(&t->cursor);
		if (!lp_space_next(t->space, cursor, max_pages, false, run)) {
			atomic_compare_exchange_strong(&t->cursor, &cursor, 0);
			return false;
		}
		s->end = (run->addr | (STRIPE - 1)) + 1;
		if (atomic_compare_exchange_strong(&t->cursor, &cursor, s->end))
			break;
	}
out:
	if (run->nr_pages > (s->end - run->addr) >> LP_PAGE_SHIFT)
		run->nr_pages = (s->end - run->addr) >> LP_PAGE_SHIFT;
	return true;
}

/* This call ends before the stripe: the next one goes on there, unless another thread has taken a stripe behind it. */
static void leave_stripe(struct lp_task *t, const struct stripe *s)
{
	uint64_t end = s->end;

	if (s->at < end && s->leads == atomic_load(&t->nr_leads))
		atomic_compare_exchange_strong(&t->cursor, &end, s->at);
}

int64_t lp_task_transfer(struct lp_task *t, uint64_t max_bytes)
{
	uint64_t brought = 0;
	struct stripe stripe = {0};
	bool occupies = false;
	struct lp_aside aside;
	int rc = 0;

	lp_aside_begin(&aside, &t->engine->follow);
	for (int turned = 0, tries = 0, waits = 0; brought < max_bytes && !rc;) {
		uint64_t now = lp_now_ns(), quiet = now - atomic_load_explicit(&t->engine->last_fault, memory_order_relaxed);
		bool changing = now - atomic_load_explicit(&t->last_change, memory_order_relaxed) < CHANGING_NS;
		uint64_t most = chunk(t->engine);
		bool cold = false;
		struct lp_run run;

		if (most > max_bytes - brought)
			most = (max_bytes - brought + LP_PAGE_SIZE - 1) & ~(LP_PAGE_SIZE - 1);
		if (!lp_aside_look(&aside, &t->engine->follow, quiet < ASIDE_NS)) {
			const struct timespec pause = {.tv_nsec = ASIDE_NS};

			/* the other CPUs are taken: a second thread there would only be in the way */
			if (++waits == ASIDE_TRIES)
				rc = -EAGAIN;
			nanosleep(&pause, NULL);
			continue;
		}
		if (changing) {
			const struct timespec pause = {.tv_nsec = CHANGING_PAUSE_NS}, turn = {.tv_nsec = LP_RETRY_MOST_NS};

			if (!occupies && atomic_exchange(&t->occupied, true)) {
				nanosleep(&turn, NULL);
				continue;
			}
			occupies = true;
			nanosleep(&pause, NULL);
		} else if (occupies) {
			atomic_store(&t->occupied, false);
			occupies = false;
		}
		lp_lock_shared(&t->lock);
		if (!lp_is_served(t) || atomic_load(&t->gone)) {
			rc = -ESRCH;
		} else if (t->nr_changes) {
			rc = -EAGAIN;
		} else if (!next_run(t, &stripe, most >> LP_PAGE_SHIFT, &run)) {
			/* round again once: for what was released behind us */
			if (turned++)
				rc = 1;
		} else if (!is_prefetched(&stripe, &run)) {
			stripe.at = run.addr;
			cold = true;
		} else {
			stripe.at = run.addr + (run.nr_pages << LP_PAGE_SHIFT);
			rc = bring_run(t, &run, &stripe.look);
			brought += run.nr_pages << LP_PAGE_SHIFT;
			if (!run.nr_pages && ++tries > LOOKAHEAD_TRIES)
				rc = 1;
		}
		lp_unlock_shared(&t->lock);
		if (cold)
			prefetch(t, &stripe, &run);
	}
	leave_stripe(t, &stripe);
	if (occupies)
		atomic_store(&t->occupied, false);
	lp_aside_end(&aside, &t->engine->follow);
	if (rc < 0 && !(rc == -EAGAIN && brought))
		return rc;
	return (int64_t)brought;
}

int lp_task_bring(struct lp_task *t, uint64_t start, uint64_t end)
{
	struct lp_run run;
	int rc = 0;

	lp_lock_shared(&t->lock);
	if (!lp_is_served(t) || atomic_load(&t->gone))
		rc = -ESRCH;
	else if (t->nr_changes)
		rc = -EAGAIN;
	for (uint64_t at = start; at < end && !rc; at += run.nr_pages << LP_PAGE_SHIFT) {
		uint64_t claimed;

		run = lp_space_lookup(t->space, at, (end - at) >> LP_PAGE_SHIFT);
		if (run.kind != LP_DATA && run.kind != LP_REMOTE)
			continue;
		claimed = lp_space_claim(t->space, run.index, run.nr_pages);
		run.nr_pages = claimed ? claimed : 1;
		if (!claimed)
			continue; /* another thread was faster */
		if (run.kind == LP_DATA) {
			uint64_t begun = lp_task_trace_begin(t);

			rc = lp_copy_level(t, &run, LP_RELEASE_SHARED, LP_NO_PAGE, NULL);
			if (!rc)
				lp_task_trace_took(t, begun, LP_TRACE_BROUGHT, lp_trace_source(run.source), run.addr, run.nr_pages);
		} else {
			lp_task_trace(t, LP_TRACE_FETCHED, LP_TRACE_REMOTE, run.addr, run.nr_pages, run.dump_addr);
			if (!lp_post(t->engine, (struct lp_event){.kind = LP_EVENT_NEED,
								  .task = t,
								  .addr = run.addr,
								  .dump_addr = run.dump_addr,
								  .nr_pages = run.nr_pages}))
				lp_space_release(t->space, run.index, run.nr_pages);
		}
	}
	lp_unlock_shared(&t->lock);
	return rc;
}
