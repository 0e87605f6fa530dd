#include "wiped.h"

#include <errno.h>
#include <stdlib.h>

#include "events.h"
#include "smaps.h"

struct lp_wiped {
	struct lp_ranges wiped, kept;
	bool failed; /* there was no memory */
};

static void add_seen(void *arg, uint64_t start, uint64_t end, bool wiped)
{
	struct lp_wiped *seen = arg;

	if (!lp_ranges_add(wiped ? &seen->wiped : &seen->kept, start, end))
		seen->failed = true;
}

struct lp_wiped *lp_look_at_wiped(struct lp_task *t)
{
	struct lp_wiped *seen;
	int rc;

	if (!t->pid || !lp_space_pending(t->space))
		return NULL;
	seen = calloc(1, sizeof(*seen));
	if (!seen) {
		lp_mark_broken(t, ENOMEM);
		return NULL;
	}
	/* after an execve it is of another memory */
	rc = lp_each_mapping(t->pid, t->pidfd, add_seen, seen);
	if (rc == -EMFILE || rc == -ENFILE || rc == -ENOMEM || seen->failed)
		lp_mark_broken(t, rc ? -rc : ENOMEM); /* read later, it would be what was said since */
	else if (rc || lp_probe_page(t, LP_ANYWHERE) == LP_TASK_GONE)
		seen->wiped.nr = seen->kept.nr = 0;
	return seen;
}

void lp_free_wiped(struct lp_wiped *seen)
{
	if (!seen)
		return;
	free(seen->wiped.at);
	free(seen->kept.at);
	free(seen);
}

void lp_learn_wiped(struct lp_task *t, struct lp_wiped *seen)
{
	if (seen && lp_space_wipe(t->space, seen->wiped.at, seen->wiped.nr, seen->kept.at, seen->kept.nr))
		lp_mark_broken(t, ENOMEM);
	lp_free_wiped(seen);
}
