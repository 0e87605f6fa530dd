#include "channel_tasks.h"

#include <errno.h>
#include <stdlib.h>

#include "common/clock.h"
#include "stats.h"

/* Places pages in the task and in its forked descendants. */
static int place_in_family(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes)
{
	struct lp_engine *e = arg;
	size_t nr = 0;
	int rc = 0;

	pthread_mutex_lock(&e->lock);
	for (struct lp_task *t = e->families[tag % LP_FAMILIES]; t; t = t->next_of_family) {
		if (t->tag != tag)
			continue;
		if (nr == e->cap_family) {
			size_t cap = e->cap_family ? e->cap_family * 2 : 16;
			struct lp_task **more = realloc(e->family, cap * sizeof(*more));

			if (!more) {
				pthread_mutex_unlock(&e->lock);
				return -EAGAIN;
			}
			e->family = more;
			e->cap_family = cap;
		}
		e->family[nr++] = t;
	}
	pthread_mutex_unlock(&e->lock);
	if (e->ready == 1 && nr == 1 && lp_nr_waiting(e->family[0]) == 1)
		lp_follow_yield(&e->follow, lp_now_ns());
	else
		lp_follow_insist(&e->follow);
	/* After -EAGAIN the caller repeats the call for all tasks: those that have the pages skip them. */
	for (size_t i = 0; i < nr; i++)
		if (lp_task_deliver(e->family[i], dump_addr, nr_pages, bytes) == -EAGAIN)
			rc = -EAGAIN;
	return rc;
}

static int64_t claim(void *arg, struct lp_task *t, uint64_t max_pages, uint64_t *tag, uint64_t *dump_addr)
{
	*tag = t->tag;
	return lp_claim_background(t, max_pages, dump_addr);
}

static void give_back(void *arg, struct lp_task *t, uint64_t dump_addr, uint64_t nr_pages)
{
	lp_task_fail_remote(t, dump_addr, nr_pages, false);
}

struct lp_channel_tasks lp_channel_tasks_of(struct lp_engine *e)
{
	return (struct lp_channel_tasks){e, place_in_family, claim, give_back};
}
