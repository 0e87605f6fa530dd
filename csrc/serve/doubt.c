#define _GNU_SOURCE
#include "doubt.h"

#include <errno.h>
#include <stdlib.h>

#define LOOKS 8 /* pages that may prove that nothing was unmapped: most are there if it was not */

enum lp_verdict lp_verdict(const struct lp_doubt *d, const struct lp_evidence *e)
{
	if (!e->here)
		return LP_IS_GONE;
	if (e->present)
		return LP_STAYS;
	if (d->edge == LP_NO_EDGE)
		return LP_UNKNOWN;
	if (e->attached)
		return LP_IS_GONE;
	if (d->unsure || e->grows || (e->below && !e->alike))
		return LP_UNKNOWN;
	return LP_STAYS;
}

/* The same for a child; `e` is what it has, `parent` what its parent has now. */
static enum lp_verdict verdict_of_child(const struct lp_doubt *d, const struct lp_evidence *e,
					const struct lp_evidence *parent)
{
	if (!e->here)
		return LP_IS_GONE;
	/* forked before: the parent has not got it any more */
	if (e->present || d->refilled || !parent->here)
		return LP_STAYS;
	/* grown in the parent: if in the child, too, before the fork or never */
	if (parent->attached)
		return e->attached ? LP_UNKNOWN : LP_STAYS;
	return lp_verdict(d, parent);
}

/* 1: yes, 0: no, or -EAGAIN, -ESRCH */
static int is_within(const struct lp_ask *ask, uint64_t start, uint64_t end)
{
	int rc = ask->within(ask->arg, start, end);

	return rc == -ENOENT ? 0 : rc ? rc : 1;
}

/* Growth comes from one end, and need not have reached the other. */
static int is_here(const struct lp_ask *ask, const struct lp_doubt *d)
{
	int rc = is_within(ask, d->end - LP_PAGE_SIZE, d->end);

	return rc == 1 ? is_within(ask, d->start, d->start + LP_PAGE_SIZE) : rc;
}

static int is_present(const struct lp_space *s, const struct lp_ask *ask, const struct lp_doubt *d)
{
	uint64_t addrs[LOOKS];
	size_t nr = lp_space_not_pending(s, d, addrs, LOOKS);

	for (size_t i = 0; i < nr; i++) {
		int rc = ask->zero(ask->arg, addrs[i]);

		if (rc == -EEXIST)
			return 1;
		if (rc && rc != -ENOENT)
			return rc;
	}
	return 0;
}

#define ASK(field, question)                                                                                           \
	do {                                                                                                           \
		int rc_ = (question);                                                                                  \
		if (rc_ < 0)                                                                                           \
			return rc_;                                                                                    \
		(field) = rc_;                                                                                         \
	} while (0)

/*
 * 0, -EAGAIN, -ESRCH.  pages: of whose space the pages are that are looked for, NULL: none.  To be done once only, for it leaves
 * pages of zeros.
 */
static int gather(const struct lp_space *pages, const struct lp_ask *ask, const struct lp_doubt *d, struct lp_evidence *e)
{
	*e = (struct lp_evidence){0};
	ASK(e->here, is_here(ask, d));
	if (!e->here)
		return 0;
	if (pages)
		ASK(e->present, is_present(pages, ask, d));
	if (e->present || d->edge == LP_NO_EDGE)
		return 0;
	ASK(e->attached, is_within(ask, d->edge - LP_PAGE_SIZE, d->start + LP_PAGE_SIZE));
	if (e->attached)
		return 0;
	ASK(e->below, is_within(ask, d->edge - LP_PAGE_SIZE, d->edge));
	if (e->below)
		e->alike = ask->alike(ask->arg, d->edge, d->start, d->end);
	ASK(e->grows, is_within(ask, d->end - LP_PAGE_SIZE, d->top + LP_PAGE_SIZE));
	if (e->grows)
		e->grows = ask->grows(ask->arg, d->top);
	return 0;
}

static int answer(struct lp_space *s, const struct lp_ask *ask, const struct lp_doubt *d, size_t i,
		  enum lp_verdict verdict, struct lp_counts *dropped)
{
	int rc = lp_space_answer_doubt(s, i, verdict == LP_IS_GONE, dropped);

	if (!rc && verdict != LP_IS_GONE)
		ask->stays(ask->arg, d->start, d->end, verdict == LP_STAYS);
	return rc;
}

int lp_settle(struct lp_space *s, const struct lp_ask *ask, struct lp_counts *dropped)
{
	for (size_t i = lp_space_nr_doubts(s); i--;) {
		struct lp_doubt d = lp_space_doubt(s, i);
		struct lp_evidence e = {0};
		int rc = lp_space_in_doubt(s, &d) ? gather(d.asked ? NULL : s, ask, &d, &e) : 0;

		if (rc == -EAGAIN) {
			lp_space_asked(s, i);
			return rc;
		}
		/* of a task that is gone nothing is here */
		rc = answer(s, ask, &d, i, lp_verdict(&d, &e), dropped);
		if (rc)
			return rc;
	}
	return 0;
}

bool lp_leaves_source(const struct lp_change *changes, size_t nr, const struct lp_change *move)
{
	for (size_t k = 0; k < nr; k++)
		if (changes[k].kind == LP_UNMAPPED && changes[k].start == move->start && changes[k].len == move->len)
			return true;
	return false;
}

/* Whether move i was made before the child was forked: 1, 0, -EAGAIN, -ESRCH.  *tangled: it is not known. */
static int has_moved(const struct lp_change *changes, size_t nr, size_t i, const struct lp_ask *ask,
		     const struct lp_ask *ask_parent, bool *tangled)
{
	const struct lp_change *move = &changes[i];
	bool cleared = false;
	int rc;

	rc = is_within(ask, move->to, move->to + LP_PAGE_SIZE);
	if (rc != 1 || !lp_leaves_source(changes, nr, move))
		return rc;
	rc = is_within(ask, move->start, move->start + LP_PAGE_SIZE);
	if (rc != 1)
		return rc < 0 ? rc : 1;
	/*
	 * Both: what was at `to` before may be there still, or the child has moved something there.  If neither explains it, the move
	 * has brought what is there, and other memory has grown in the child to where that was.
	 */
	for (size_t k = 0; k < nr; k++)
		cleared |= changes[k].kind == LP_UNMAPPED && lp_overlap(changes[k].start, changes[k].len, move->to, move->len);
	if (!cleared && !ask->arrived(ask->arg, move->to))
		*tangled = true;
	/*
	 * Or it has grown there in the parent, before the fork: then the parent has that as well, because no departure of it is reported.
	 * The parent may have ended, or be changing its layout: then only what is mapped can be seen.
	 */
	rc = is_within(ask_parent, move->start, move->start + LP_PAGE_SIZE);
	*tangled |= rc == 1 || rc == -ESRCH || (rc == -EAGAIN && ask_parent->mapped(ask_parent->arg, move->start));
	return 0;
}

/* Whether a change is about what one of the moves before it has brought, of those that the child has not seen. */
static bool after_a_move(const struct lp_change *changes, size_t i, const bool *unmade, const struct lp_change *change)
{
	while (i--)
		if (unmade[i] && changes[i].to < change->start + change->len &&
		    change->start < changes[i].to + changes[i].len)
			return true;
	return false;
}

static bool meet(const struct lp_change *a, const struct lp_change *b)
{
	uint64_t len = a->len > b->len ? a->len : b->len;

	return lp_overlap(a->start, len, b->start, len);
}

/*
 * Whether a place that a move has taken or left is taken or left again, but by what that mremap itself unmaps; or a move has left
 * something (MREMAP_DONTUNMAP) and taken a place that was cleared for it: both are there before it as after it.
 */
static bool are_tangled(const struct lp_change *changes, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		const struct lp_change *move = &changes[i];
		const struct lp_change to = {.start = move->to, .len = move->len};
		size_t unmaps = 0;
		bool clears = false;

		for (size_t k = 0; k < nr && move->kind == LP_REMAPPED; k++) {
			const struct lp_change *other = &changes[k];
			const struct lp_change others_to = {.start = other->to, .len = other->len};

			if (k == i)
				continue;
			if (other->kind == LP_REMAPPED && (meet(move, other) || meet(&to, other) || meet(move, &others_to) ||
							   meet(&to, &others_to)))
				return true;
			if (other->kind == LP_UNMAPPED && ((meet(&to, other) && k > i) || (meet(move, other) && unmaps++)))
				return true;
			if (other->kind == LP_REMOVED && (meet(&to, other) || meet(move, other)))
				return true;
			clears |= other->kind == LP_UNMAPPED && meet(&to, other);
		}
		if (clears && !unmaps)
			return true;
	}
	return false;
}

/* All that is pending where something has changed is lost. */
static void lose_touched(const struct lp_change *changes, size_t nr, const struct lp_ask *ask)
{
	struct lp_range places[2];

	for (size_t i = 0; i < nr; i++)
		for (size_t k = 0, n = lp_places(&changes[i], places); k < n; k++)
			ask->stays(ask->arg, places[k].start, places[k].end, false);
}

int lp_replay(struct lp_space *s, const struct lp_change *changes, size_t nr, uint64_t reported, bool again,
	      const struct lp_ask *ask, const struct lp_ask *ask_parent, struct lp_counts *dropped, bool *tangled)
{
	bool *unmade = calloc(nr + 1, sizeof(*unmade));
	int rc = unmade ? 0 : -ENOMEM;

	*tangled = are_tangled(changes, nr);

	for (size_t i = 0; i < nr && !rc; i++) {
		const struct lp_change *change = &changes[i];
		uint64_t end = change->start + change->len;

		switch (change->kind) {
		case LP_REMOVED:
			if (change->to < reported && !after_a_move(changes, i, unmade, change))
				rc = lp_space_remove_from_child(s, change->start, end, dropped);
			break;
		case LP_UNMAPPED:
			rc = lp_space_question(s, change->start, end);
			break;
		case LP_REMAPPED:
			rc = has_moved(changes, nr, i, ask, ask_parent, tangled);
			unmade[i] = rc != 1;
			if (rc < 0)
				break;
			/* memory that the space did not know need not have been there at the fork: what was in its way may be */
			if (!rc)
				lp_space_refill(s, change->to, change->to + change->len);
			else if (!lp_space_knows(s, change->start, end))
				lp_space_obscure(s, change->to, change->to + change->len);
			rc = rc && lp_space_knows(s, change->start, end) ?
				     lp_space_remap(s, change->start, change->to, change->len, dropped) :
				     0;
			break;
		}
	}
	free(unmade);
	lp_space_quiescent(s);
	for (size_t i = lp_space_nr_doubts(s); i-- && !rc;) {
		struct lp_doubt d = lp_space_doubt(s, i);
		struct lp_evidence e = {0}, parent = {0};
		enum lp_verdict verdict = LP_IS_GONE;

		if (lp_space_in_doubt(s, &d)) {
			rc = gather(again || *tangled || d.asked ? NULL : s, ask, &d, &e);
			if (rc == -EAGAIN)
				return rc;
			/* what is there in the parent may be something else */
			rc = e.here && !e.present ? gather(NULL, ask_parent, &d, &parent) : 0;
			verdict = rc < 0 ? LP_UNKNOWN : verdict_of_child(&d, &e, &parent);
		}
		rc = answer(s, ask, &d, i, verdict, dropped);
	}
	if (*tangled)
		lose_touched(changes, nr, ask);
	return rc == -ESRCH ? 0 : rc;
}
