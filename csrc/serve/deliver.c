#include "engine.h"

#include <errno.h>

#include "copy.h"
#include "events.h"
#include "stats.h"
#include "task_trace.h"
#include "wake.h"

/* Claims the next run that a remote source must give, from *cursor on, and moves that behind it; 0 pages: none. (lock held) */
static uint64_t claim_next(struct lp_task *t, uint64_t *cursor, uint64_t max_pages, uint64_t *dump_addr)
{
	struct lp_run run;
	uint64_t nr;

	while (lp_space_next(t->space, *cursor, max_pages, true, &run)) {
		*cursor = run.addr + (run.nr_pages << LP_PAGE_SHIFT);
		nr = lp_space_claim(t->space, run.index, run.nr_pages);
		if (!nr)
			continue;
		lp_task_trace(t, LP_TRACE_FETCHED, LP_TRACE_REMOTE, run.addr, nr, run.dump_addr);
		*dump_addr = run.dump_addr;
		*cursor = run.addr + (nr << LP_PAGE_SHIFT);
		return nr;
	}
	return 0;
}

int64_t lp_claim_background(struct lp_task *t, uint64_t max_pages, uint64_t *dump_addr)
{
	int64_t nr = 0;

	lp_lock_shared(&t->lock);
	if (lp_is_served(t) && !atomic_load(&t->gone) && t->nr_changes) {
		nr = -EAGAIN;
	} else if (lp_is_served(t) && !atomic_load(&t->gone)) {
		bool from_start = !t->channel_cursor;

		nr = (int64_t)claim_next(t, &t->channel_cursor, max_pages, dump_addr);
		if (!nr) { /* round again: what was released behind the cursor */
			t->channel_cursor = 0;
			nr = from_start ? 0 : (int64_t)claim_next(t, &t->channel_cursor, max_pages, dump_addr);
		}
	}
	lp_unlock_shared(&t->lock);
	return nr;
}

/* The next piece of dump addresses [dump_addr, +nr_pages) that a region holds; its answer starts where the task has it now. */
static bool next_piece(const struct lp_task *t, uint64_t *dump_addr, uint64_t end, bool unasked, struct lp_run *piece)
{
	uint64_t addr;

	for (; *dump_addr < end; *dump_addr += LP_PAGE_SIZE) {
		if (!lp_space_locate(t->space, *dump_addr, &addr))
			continue;
		*piece = lp_space_lookup(t->space, addr, (end - *dump_addr) >> LP_PAGE_SHIFT);
		if (piece->kind == LP_CLAIMED)
			return true;
		/* not asked for yet: good to have all the same (only deliver does so) */
		if (piece->kind == LP_REMOTE && unasked &&
		    (piece->nr_pages = lp_space_claim(t->space, piece->index, piece->nr_pages)))
			return true;
	}
	return false;
}

int64_t lp_task_deliver(struct lp_task *t, uint64_t dump_addr, uint64_t nr_pages, const void *buffer)
{
	uint64_t at = dump_addr, end = dump_addr + (nr_pages << LP_PAGE_SHIFT), placed = 0;
	struct lp_run piece;
	int rc = 0;

	lp_lock_shared(&t->lock);
	if (!lp_is_served(t))
		rc = -ESRCH;
	else if (t->nr_changes)
		rc = -EAGAIN;
	while (!rc && next_piece(t, &at, end, true, &piece)) {
		uint64_t begun = lp_task_trace_begin(t);

		rc = lp_copy_buffer(t, &piece, (const char *)buffer + (at - dump_addr), LP_KEEP_CLAIMS);
		if (!rc)
			lp_task_trace_took(t, begun, LP_TRACE_ARRIVED, LP_TRACE_REMOTE, piece.addr, piece.nr_pages);
		placed += piece.nr_pages;
		at += piece.nr_pages << LP_PAGE_SHIFT;
	}
	lp_unlock_shared(&t->lock);
	if (!rc)
		lp_end_wait(t, dump_addr, end, true);
	return rc ? rc : (int64_t)placed;
}

void lp_task_fail_remote(struct lp_task *t, uint64_t dump_addr, uint64_t nr_pages, bool lost)
{
	uint64_t at = dump_addr, end = dump_addr + (nr_pages << LP_PAGE_SHIFT);
	struct lp_run piece;

	lp_lock_shared(&t->lock);
	while (t->uffd >= 0 && next_piece(t, &at, end, false, &piece)) {
		if (lost) {
			lp_mark_lost(t, &piece, 0, piece.nr_pages, ENODATA);
		} else {
			lp_space_release(t->space, piece.index, piece.nr_pages);
			lp_wake(t, piece.addr, piece.nr_pages);
		}
		at += piece.nr_pages << LP_PAGE_SHIFT;
	}
	lp_unlock_shared(&t->lock);
	lp_end_wait(t, dump_addr, end, false);
}
