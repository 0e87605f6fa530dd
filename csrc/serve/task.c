#define _GNU_SOURCE
#include "task.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "events.h"
#include "guard.h"
#include "task_trace.h"
#include "wiped.h"

struct lp_task *lp_task_alloc(struct lp_engine *e, int uffd, uint32_t nr_levels)
{
	struct lp_task *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->engine = e;
	t->uffd = uffd;
	/* CRIU's is non-blocking already, but one that is not would stop the service of all */
	fcntl(uffd, F_SETFL, O_NONBLOCK);
	t->nr_levels = nr_levels;
	t->levels = calloc(nr_levels + 1, sizeof(*t->levels));
	t->copied = calloc(3 * ((size_t)nr_levels + 2), sizeof(lp_counter));
	if (!t->levels || !t->copied) {
		free(t->levels);
		free((void *)t->copied);
		free(t);
		return NULL;
	}
	t->dropped = t->copied + nr_levels + 2;
	t->served = t->dropped + nr_levels + 2;
	lp_lock_init(&t->lock);
	pthread_mutex_init(&t->waiting_lock, NULL);
	return t;
}

bool lp_close_uffd(struct lp_task *t)
{
	bool safe = !lp_space_pending(t->space) && !t->unsure.nr && !atomic_load(&t->broken);

	bool closes = safe || atomic_load(&t->gone) || lp_probe_page(t, LP_ANYWHERE) == LP_TASK_GONE;

	if (closes)
		lp_guard_close(t->engine->guard, t->uffd);
	else
		lp_guard_leave(t->engine->guard, t->uffd);
	t->uffd = -1;
	return !closes;
}

void lp_free_new_child(struct lp_new_child *child)
{
	if (!child)
		return;
	if (child->task) {
		/* it stays open, as that of a child whose fork has not been read */
		lp_guard_leave(child->task->engine->guard, child->task->uffd);
		child->task->uffd = -1;
		lp_task_free(child->task);
	}
	free(child->dropped.by_source);
	free(child);
}

void lp_free_fork(struct lp_fork *fork_events)
{
	lp_space_free(fork_events->before);
	free(fork_events->made);
	lp_free_new_child(fork_events->child);
	*fork_events = (struct lp_fork){0};
}

void lp_task_free(struct lp_task *t)
{
	int in_work = t->fork.child && t->fork.child->task ? t->fork.child->task->uffd : -1; /* its change is still there, too */

	lp_free_fork(&t->fork);
	lp_guarded_forget(&t->engine->guarded, t);
	if (t->uffd >= 0)
		lp_close_uffd(t);
	for (size_t i = 0; i < t->nr_changes; i++) {
		if (t->changes[i].kind == LP_FORKED && t->changes[i].uffd != in_work) /* its child's stays open, as above */
			lp_guard_leave(t->engine->guard, t->changes[i].uffd);
		lp_free_wiped(t->changes[i].seen);
	}
	free(t->unsure.at);
	free(t->changes);
	lp_space_free(t->space);
	lp_lock_destroy(&t->lock);
	pthread_mutex_destroy(&t->waiting_lock);
	free(t->waiting);
	lp_faults_free(&t->faults);
	lp_faults_free(&t->deferred);
	free(t->levels);
	free((void *)t->copied);
	free(t);
}

void lp_number_memory(struct lp_task *t, uint32_t parent)
{
	t->number = atomic_fetch_add(&t->engine->nr_memories, 1) + 1;
	lp_task_trace(t, LP_TRACE_MEMORY, LP_TRACE_NO_SOURCE, 0, t->total, parent);
}

void lp_task_link(struct lp_task *t)
{
	struct lp_engine *e = t->engine;

	pthread_mutex_lock(&e->lock);
	t->next = e->tasks;
	e->tasks = t;
	t->next_of_family = e->families[t->tag % LP_FAMILIES];
	e->families[t->tag % LP_FAMILIES] = t;
	pthread_mutex_unlock(&e->lock);
}

int lp_task_start(struct lp_task *t)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = t};
	int rc = 0;

	lp_lock_alone(&t->lock);
	if (t->uffd >= 0 && epoll_ctl(t->engine->epfd, EPOLL_CTL_ADD, t->uffd, &event))
		rc = -errno;
	if (t->uffd >= 0 && !rc)
		lp_check_complete(t);
	lp_unlock_alone(&t->lock);
	return rc;
}
