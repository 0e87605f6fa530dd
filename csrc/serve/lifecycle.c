#define _GNU_SOURCE
#include "lifecycle.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "channel_tasks.h"
#include "common/clock.h"
#include "deferred.h"
#include "events.h"
#include "guard.h"
#include "layout.h"
#include "memory.h"
#include "smaps.h"
#include "task.h"

/* How often a child whose layout is changing is waited for when its parent is closed, and for how long each time. */
#define CLOSE_TRIES 60
#define CLOSE_PAUSE_NS (LP_NS / 1000)

struct lp_task *lp_task_new(struct lp_engine *e, int uffd, struct lp_memory *memory, uint64_t max_readahead, pid_t pid,
			    int pidfd, uint64_t tag)
{
	struct lp_task *t = lp_task_alloc(e, uffd, memory->nr_levels);

	if (!t) {
		lp_memory_free(memory);
		lp_guard_names(e->guard, uffd, pid, pidfd);
		lp_guard_leave(e->guard, uffd);
		errno = ENOMEM;
		return NULL;
	}
	memcpy(t->levels, memory->levels, memory->nr_levels * sizeof(*t->levels));
	t->remote = memory->remote;
	t->space = memory->space;
	memory->space = NULL;
	lp_memory_free(memory);
	t->total = lp_space_pending(t->space);
	t->pid = pid;
	t->pidfd = pidfd;
	t->tag = tag;
	lp_guard_names(e->guard, uffd, pid, pidfd);
	lp_number_memory(t, 0);
	lp_readahead_init(&t->readahead, max_readahead);
	lp_task_link(t); /* before it is served: what channels bring finds it by its tag */
	int rc = lp_task_start(t);
	if (rc) {
		lp_task_end_service(t); /* the uffd stays open: pages are pending */
		lp_task_close(t);
		errno = -rc;
		return NULL;
	}
	return t;
}

bool lp_task_end_service(struct lp_task *t)
{
	const struct timespec pause = {.tv_nsec = CLOSE_PAUSE_NS};
	bool stays;

	lp_lock_alone(&t->lock);
	/* a child whose uffd has come is not to be lost with its parent */
	for (int tries = 0; lp_make_changes(t, true), t->fork.child && !atomic_load(&t->broken); tries++) {
		if (tries == CLOSE_TRIES)
			t->fork.child->until = 0;
		lp_unlock_alone(&t->lock); /* the serving thread does not wait for the child */
		nanosleep(&pause, NULL);
		lp_lock_alone(&t->lock);
	}
	epoll_ctl(t->engine->epfd, EPOLL_CTL_DEL, t->uffd, NULL);
	stays = lp_close_uffd(t);
	lp_unlock_alone(&t->lock);
	return stays;
}

bool lp_task_close(struct lp_task *t)
{
	struct lp_engine *e = t->engine;
	struct lp_task **link;
	bool spoilt;

	pthread_mutex_lock(&e->lock);
	t->closed = true;
	for (link = &e->tasks; *link; link = &(*link)->next)
		if (*link == t) {
			*link = t->next;
			break;
		}
	for (link = &e->families[t->tag % LP_FAMILIES]; *link; link = &(*link)->next_of_family)
		if (*link == t) {
			*link = t->next_of_family;
			break;
		}
	t->next_closed = e->closed;
	e->closed = t;
	spoilt = lp_forget_posted(t);
	pthread_mutex_unlock(&e->lock);
	return spoilt;
}

struct lp_engine *lp_engine_new(struct lp_guard *guard)
{
	struct lp_engine *e = calloc(1, sizeof(*e));
	struct lp_channel_tasks tasks;
	struct epoll_event event = {.events = EPOLLIN};

	if (!e)
		return NULL;
	pthread_mutex_init(&e->lock, NULL);
	lp_guarded_init(&e->guarded);
	atomic_init(&e->follow.cpu, -1);
	e->guard = guard;
	e->retry_ns = LP_RETRY_FIRST_NS;
	e->epfd = epoll_create1(EPOLL_CLOEXEC);
	e->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->unreadable = mmap(NULL, LP_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	e->read_buffer = aligned_alloc(LP_PAGE_SIZE, LP_READ_PAGES << LP_PAGE_SHIFT);
	if (!e->read_buffer || e->unreadable == MAP_FAILED || e->epfd < 0 || e->wakefd < 0 || e->eventfd < 0 ||
	    epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->wakefd, &event) || lp_mappings_reserve()) {
		int saved = errno;

		lp_engine_free(e);
		errno = saved;
		return NULL;
	}
	tasks = lp_channel_tasks_of(e);
	lp_channels_init(&e->channels, e->epfd, e->wakefd, &tasks);
	return e;
}

struct lp_channels *lp_engine_channels(struct lp_engine *e)
{
	return &e->channels;
}

void lp_reap(struct lp_engine *e)
{
	struct lp_task *dead, **link;

	pthread_mutex_lock(&e->lock);
	dead = e->closed;
	e->closed = NULL;
	pthread_mutex_unlock(&e->lock);
	lp_collect_released(e); /* no thread of the background puts a closed task there any more, but one may have done so before */
	while (dead) {
		struct lp_task *t = dead;

		dead = t->next_closed;
		for (link = &e->retries; t->awaits_retry && *link; link = &(*link)->next_retry)
			if (*link == t) {
				*link = t->next_retry;
				break;
			}
		lp_channels_forget(&e->channels, t);
		lp_task_free(t);
	}
}

void lp_engine_free(struct lp_engine *e)
{
	if (!e)
		return;
	lp_reap(e);
	while (e->tasks) {
		struct lp_task *t = e->tasks;

		e->tasks = t->next;
		lp_task_free(t);
	}
	lp_channels_free(&e->channels);
	lp_guarded_end(&e->guarded);
	free(e->family);
	free(e->read_buffer);
	if (e->epfd >= 0)
		close(e->epfd);
	if (e->wakefd >= 0)
		close(e->wakefd);
	if (e->eventfd >= 0)
		close(e->eventfd);
	if (e->unreadable != MAP_FAILED)
		munmap(e->unreadable, LP_PAGE_SIZE);
	pthread_mutex_destroy(&e->lock);
	free(e->events);
	free(e);
}

bool lp_engine_has_tasks(struct lp_engine *e)
{
	bool any;

	pthread_mutex_lock(&e->lock);
	any = e->tasks != NULL;
	pthread_mutex_unlock(&e->lock);
	return any;
}

void lp_engine_trace(struct lp_engine *e, struct lp_trace *trace)
{
	e->trace = trace;
}
