#define _GNU_SOURCE
#include "check_plan.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "restore_plan.h"

#define PAGE 4096ull
#define ADDRESSES (1ull << 56) /* more than any task has, and few enough for sums */

/* What is known at an op. */
struct check {
	const struct lp_plan *plan;
	const struct lp_op *op;
	const void *body;
	bool *alive;	  /* threads that have been made and not ended */
	uint64_t *shared; /* slots: bytes of shared memory, 0: none */
};

static size_t padded(uint32_t size)
{
	return ((size_t)size + 7) / 8 * 8;
}

static bool is_slot(const struct check *c, uint32_t slot)
{
	return slot < c->plan->nr_slots;
}

static bool is_alive(const struct check *c, uint32_t thread)
{
	return thread < c->plan->nr_threads && c->alive[thread];
}

/* Whether these bytes are one text, with its NUL. */
static bool is_text(const void *bytes, size_t size)
{
	return size && memchr(bytes, 0, size) == (const char *)bytes + size - 1;
}

static bool fits(const struct check *c, size_t size)
{
	return c->op->body_size >= size;
}

static bool check_spawn(const struct check *c, const struct lp_spawn *spawn)
{
	uint32_t thread = c->op->thread;

	if (thread >= c->plan->nr_threads || c->alive[thread] || spawn->tid <= 0 ||
	    (spawn->parent == LP_NONE ? !!(spawn->flags & CLONE_THREAD) : !is_alive(c, spawn->parent)))
		return false;
	c->alive[thread] = true;
	return true;
}

static bool check_exit(const struct check *c, int status)
{
	if (!is_alive(c, c->op->thread) || (!WIFEXITED(status) && !WIFSIGNALED(status)))
		return false;
	c->alive[c->op->thread] = false;
	return true;
}

static bool check_reap(const struct check *c, uint32_t helper)
{
	if (!is_alive(c, c->op->thread) || !is_alive(c, helper) || helper == c->op->thread)
		return false;
	c->alive[helper] = false;
	return true;
}

static bool check_ranges(const struct lp_fill_range *ranges, uint64_t nr, uint64_t most)
{
	uint64_t before = 0;

	for (uint64_t i = 0; i < nr; i++) {
		if (ranges[i].start < before || ranges[i].end <= ranges[i].start || ranges[i].end > most)
			return false;
		before = ranges[i].end;
	}
	return true;
}

static bool check_extents(const struct lp_extent *extents, uint64_t nr)
{
	uint64_t before = 0;

	for (uint64_t i = 0; i < nr; i++) {
		if (extents[i].start < before || !extents[i].nr_pages || extents[i].start >= ADDRESSES ||
		    extents[i].nr_pages > (ADDRESSES - extents[i].start) / PAGE || extents[i].offset >= ADDRESSES)
			return false;
		before = extents[i].start + extents[i].nr_pages * PAGE;
	}
	return true;
}

static bool check_fill(const struct check *c, const struct lp_fill *fill)
{
	const uint32_t *levels = (const void *)(fill + 1);
	uint64_t left = c->op->body_size - sizeof(*fill), size = ((uint64_t)fill->nr_levels + 1) / 2 * 8;
	uint64_t most = UINT64_MAX; /* vsyscall lies there */
	const struct lp_fill_range *ranges;

	if (c->op->thread == LP_NONE)
		most = is_slot(c, fill->shared) ? c->shared[fill->shared] : 0;
	else if (!is_alive(c, c->op->thread))
		return false;
	if (size > left || fill->nr_ranges > (left - size) / sizeof(*ranges))
		return false;
	ranges = (const void *)((const char *)levels + size);
	left -= size + fill->nr_ranges * sizeof(*ranges);
	if (fill->nr_extents > left / sizeof(struct lp_extent))
		return false;
	for (uint32_t i = 0; i < fill->nr_levels; i++)
		if (levels[i] != LP_NONE && !is_slot(c, levels[i]))
			return false;
	return check_ranges(ranges, fill->nr_ranges, most) &&
	       check_extents((const void *)(ranges + fill->nr_ranges), fill->nr_extents);
}

static bool check_regs(const struct check *c, const struct lp_regs *regs)
{
	const char *place = (const char *)(regs + 1);
	size_t left = padded(c->op->body_size) - sizeof(*regs);

	while (left) {
		const struct lp_component *component = (const void *)place;
		size_t size = sizeof(*component);

		if (left < size || padded(component->size) > left - size)
			return false;
		size += padded(component->size);
		place += size;
		left -= size;
	}
	return is_alive(c, c->op->thread);
}

static bool check_body(const struct check *c)
{
	const char *text = c->body;
	uint32_t thread = c->op->thread, size = c->op->body_size;

	switch (c->op->kind) {
	case LP_OPEN:
		return fits(c, sizeof(struct lp_open)) && is_slot(c, ((const struct lp_open *)c->body)->slot) &&
		       is_text(text + sizeof(struct lp_open), size - sizeof(struct lp_open));
	case LP_PIPE: {
		const struct lp_pipe *pipe = c->body;

		return fits(c, sizeof(*pipe)) && is_slot(c, pipe->reader) && is_slot(c, pipe->writer);
	}
	case LP_REOPEN: {
		const struct lp_reopen *reopen = c->body;

		return fits(c, sizeof(*reopen)) && is_slot(c, reopen->slot) && is_slot(c, reopen->from);
	}
	case LP_SHARED: {
		const struct lp_shared *shared = c->body;

		if (!fits(c, sizeof(*shared)) || !is_slot(c, shared->slot) || c->shared[shared->slot])
			return false;
		c->shared[shared->slot] = shared->size;
		return true;
	}
	case LP_CLOSE: {
		const struct lp_close *close = c->body;

		if (!fits(c, sizeof(*close)) || !is_slot(c, close->slot))
			return false;
		c->shared[close->slot] = 0;
		return true;
	}
	case LP_WRITE: {
		const struct lp_write *write = c->body;

		return fits(c, sizeof(*write)) && write->path_size <= size - sizeof(*write) &&
		       is_text(text + sizeof(*write), write->path_size);
	}
	case LP_SPAWN:
		return fits(c, sizeof(struct lp_spawn)) && check_spawn(c, c->body);
	case LP_CALL:
		return fits(c, sizeof(struct lp_call_body)) && is_alive(c, thread);
	case LP_GIVE:
		return fits(c, sizeof(struct lp_give)) && is_slot(c, ((const struct lp_give *)c->body)->slot) &&
		       is_alive(c, thread);
	case LP_SWITCH:
		return size % sizeof(struct lp_place) == 0 && is_alive(c, thread);
	case LP_FILL:
		return fits(c, sizeof(struct lp_fill)) && check_fill(c, c->body);
	case LP_EXIT:
		return fits(c, sizeof(struct lp_exit)) && check_exit(c, (int)((const struct lp_exit *)c->body)->status);
	case LP_REAP:
		return fits(c, sizeof(struct lp_reap)) && check_reap(c, ((const struct lp_reap *)c->body)->helper);
	case LP_DRAIN:
	case LP_WAIT:
		return is_alive(c, thread);
	case LP_REGS:
		return fits(c, sizeof(struct lp_regs)) && check_regs(c, c->body);
	case LP_UFFD: {
		const struct lp_uffd *uffd = c->body;

		return fits(c, sizeof(*uffd)) && uffd->nr_ranges <= (size - sizeof(*uffd)) / sizeof(struct lp_place) &&
		       is_alive(c, thread);
	}
	case LP_ANNOUNCE:
		return fits(c, sizeof(struct lp_announce));
	case LP_FINISH:
	case LP_GO:
		return true;
	default:
		return false;
	}
}

static bool check_ops(struct check *c)
{
	const char *place = (const char *)(c->plan + 1);
	uint64_t left = c->plan->size - sizeof(*c->plan);

	for (uint32_t i = 0; i < c->plan->nr_ops; i++) {
		size_t label, body;

		c->op = (const void *)place;
		if (left < sizeof(*c->op))
			return false;
		left -= sizeof(*c->op);
		label = padded(c->op->label_size);
		body = padded(c->op->body_size);
		if (left < label || left - label < body || !is_text(c->op + 1, c->op->label_size))
			return false;
		if (c->op->thread != LP_NONE && c->op->thread >= c->plan->nr_threads) /* messages name it */
			return false;
		left -= label + body;
		c->body = (const char *)(c->op + 1) + label;
		place = (const char *)c->body + body;
		if (!check_body(c))
			return false;
	}
	return true;
}

int lp_check_plan(const void *plan, size_t size)
{
	struct check check = {.plan = plan};
	const struct lp_plan *p = plan;
	int rc = -ENOMEM;

	if (size < sizeof(*p) || p->magic != LP_PLAN_MAGIC || p->version != LP_PLAN_VERSION || p->size > size ||
	    p->size < sizeof(*p))
		return -EINVAL;
	/* an op makes a thread, or two slots, at most */
	if (p->nr_ops > size / sizeof(struct lp_op) || p->nr_threads > p->nr_ops || p->nr_slots > 2 * (uint64_t)p->nr_ops ||
	    p->scratch >= ADDRESSES || p->parking >= ADDRESSES)
		return -EINVAL;
	check.alive = calloc((size_t)p->nr_threads + 1, sizeof(*check.alive));
	check.shared = calloc((size_t)p->nr_slots + 1, sizeof(*check.shared));
	if (check.alive && check.shared)
		rc = check_ops(&check) ? 0 : -EINVAL;
	free(check.alive);
	free(check.shared);
	return rc;
}
