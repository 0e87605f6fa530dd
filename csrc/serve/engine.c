#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "deferred.h"
#include "lifecycle.h"
#include "old_length.h"
#include "serve_task.h"
#include "wakeup_fd.h"

#define EVENTS 64	   /* uffds and channels of one epoll_wait */
#define EXPECTED_NS 300000 /* how long to wait for an answer of a page server while other threads have our CPU */
#define IDLE_MS 50	   /* without a fault: then no task's CPU is followed */

static void serve_retries(struct lp_engine *e)
{
	struct lp_task *t = e->retries, *next;
	uint64_t now = lp_now_ns();

	e->retries = NULL;
	for (; t; t = next) {
		next = t->next_retry;
		t->awaits_retry = false;
		if ((t->read_error || t->pause) && now < t->next_try)
			lp_retry_later(t);
		else
			lp_serve(t);
	}
	e->retry_soon = false;
	for (t = e->retries; t && !e->retry_soon; t = t->next_retry)
		e->retry_soon = !t->read_error || t->late_until;
}

/* ns until tasks are tried again; less often while that is in vain. */
static uint64_t retry_after(struct lp_engine *e)
{
	uint64_t now = e->retry_ns;

	e->retry_ns = 2 * now < LP_RETRY_MOST_NS ? 2 * now : LP_RETRY_MOST_NS;
	return now;
}

/* As epoll_wait, but in ns. */
static int wait_for(struct lp_engine *e, struct epoll_event *events, uint64_t ns)
{
	const struct timespec most = {.tv_nsec = (long)ns};
	int n = (int)syscall(SYS_epoll_pwait2, e->epfd, events, EVENTS, &most, NULL, 0);

	if (n < 0 && errno == ENOSYS) /* Linux before 5.11 */
		n = epoll_wait(e->epfd, events, EVENTS, (int)((ns + 999999) / 1000000));
	return n;
}

static int next_events(struct lp_engine *e, struct epoll_event *events, bool again)
{
	bool following = atomic_load(&e->follow.cpu) >= 0;
	int n = 0;

	if (atomic_load(&e->follow.yields)) {
		/*
		 * A page server on this machine may run on this CPU now.  When it answers, we don't take the CPU from it
		 * before it sleeps again: otherwise the thread that gets the page would be moved to another CPU.
		 */
		const struct timespec expected = {.tv_nsec = lp_channels_expect(&e->channels) ? EXPECTED_NS : 0};

		n = (int)syscall(SYS_epoll_pwait2, e->epfd, events, EVENTS, &expected, NULL, 0);
		if (n <= 0) { /* Linux before 5.11 has no such call */
			n = 0;
			lp_follow_insist(&e->follow);
		}
	}
	if (n)
		return n;
	if (again || e->retry_soon)
		return wait_for(e, events, retry_after(e));
	if (e->retries)
		return wait_for(e, events, LP_READ_RETRY_NS);
	return epoll_wait(e->epfd, events, EVENTS, following ? IDLE_MS : -1);
}

int lp_engine_run(struct lp_engine *e)
{
	struct epoll_event events[EVENTS];
	int rc = 0;

	lp_reports_old_length(); /* found out while this thread has no special priority, and no task waits */
	lp_follow_init(&e->follow);
	atomic_store(&lp_spins, e->follow.able ? LP_SPINS : LP_SPINS_ONE_CPU);
	while (!rc && !atomic_load(&e->stop)) {
		bool again;
		int n;

		atomic_fetch_add_explicit(&e->rounds, 1, memory_order_relaxed);

		/* no task or channel that epoll_wait has named is freed before the next epoll_wait */
		lp_collect_released(e);
		lp_reap(e);
		again = lp_channels_round(&e->channels);
		n = next_events(e, events, again);
		if (n < 0 && errno != EINTR)
			rc = -errno;
		e->ready = n;
		if (!n && !e->retries)
			lp_follow_none(&e->follow);
		for (int i = 0; i < n; i++) {
			if (events[i].data.u64 & 1)
				lp_channel_ready((struct lp_channel *)(uintptr_t)(events[i].data.u64 & ~1ull));
			else if (events[i].data.ptr)
				lp_serve(events[i].data.ptr);
			else
				lp_wakeup_clear(e->wakefd);
		}
		lp_collect_released(e);
		e->retry_soon = false;
		if (e->retries)
			serve_retries(e);
	}
	lp_follow_end(&e->follow);
	return rc;
}

void lp_engine_stop(struct lp_engine *e)
{
	atomic_store(&e->stop, true);
	lp_wakeup(e->wakefd);
}

uint64_t lp_engine_rounds(struct lp_engine *e)
{
	lp_wakeup(e->wakefd);
	return atomic_load(&e->rounds);
}
