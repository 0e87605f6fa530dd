#include "channel_send.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "channel_requests.h"
#include "common/clock.h"
#include "common/page.h"

#define MIN_PAGES 4ull /* of a background request */
/*
 * Bytes of background in flight while faults share the channel: two requests, so that the server always has one.  A fault waits
 * for them.  With a smaller limit fewer faults find their page already there, and the transfer takes longer (measured with CRIU's
 * server on loopback).
 */
#define BUSY_LIMIT ((uint64_t)512 << 10)
#define BUSY_NS (2 * LP_NS / 1000) /* the channel counts as shared for so long after a fault */

void lp_channel_flush(struct lp_channel *l)
{
	int error = 0;

	pthread_mutex_lock(&l->lock);
	while (l->out_nr) {
		ssize_t n = send(l->fd, l->out, l->out_nr, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			error = errno;
			break;
		}
		l->out_nr -= (size_t)n;
		memmove(l->out, l->out + n, l->out_nr);
	}
	if (error && error != EAGAIN)
		l->out_nr = 0; /* lp_channel_receive() finds the error, after the data that has already arrived */
	pthread_mutex_unlock(&l->lock);
}

/* The number of pages of the next background request; 0: the window is full (lock held). */
static uint64_t background_room(const struct lp_channel *l, uint64_t now)
{
	bool shared = l->urgent || now - l->last_urgent < BUSY_NS;
	uint64_t limit = l->pace.limit, pages;

	if (l->options.floor > limit)
		limit = l->options.floor;
	else if (shared && limit > BUSY_LIMIT)
		limit = BUSY_LIMIT;
	if (l->background >= limit)
		return 0;
	pages = limit / 2 >> LP_PAGE_SHIFT;
	if (pages > l->options.max_pages)
		pages = l->options.max_pages;
	return pages < MIN_PAGES ? MIN_PAGES : pages;
}

void lp_channel_request_background(struct lp_channel *l)
{
	const struct lp_channel_tasks *tasks = &l->channels->tasks;
	uint64_t now = lp_now_ns(), tag, dump_addr;

	for (;;) {
		struct lp_task *spender;
		uint64_t pages;
		int64_t nr;

		pthread_mutex_lock(&l->lock);
		spender = l->paused || l->ended || l->finishing ? NULL : l->spender;
		pages = spender ? background_room(l, now) : 0;
		if (pages > l->budget_left)
			pages = l->budget_left;
		pthread_mutex_unlock(&l->lock);
		if (!pages)
			return;
		nr = tasks->claim(tasks->arg, spender, pages, &tag, &dump_addr);
		if (nr == -EAGAIN) {
			l->claim_later = true;
			return;
		}
		pthread_mutex_lock(&l->lock);
		if (nr > 0 && (l->paused || l->finishing || !lp_request_pages(l, tag, dump_addr, (uint64_t)nr, 0, false, false))) {
			l->claim_later = !l->paused && !l->finishing; /* lp_request_pages() found no memory: try again */
			pthread_mutex_unlock(&l->lock);
			tasks->give_back(tasks->arg, spender, dump_addr, (uint64_t)nr);
			return;
		}
		/* The owner may have set another budget meanwhile. */
		if (nr > 0 && l->spender == spender && l->budget_left >= (uint64_t)nr) {
			l->budget_left -= (uint64_t)nr;
			l->budget_asked += (uint64_t)nr;
		}
		if (l->spender == spender && (nr <= 0 || !l->budget_left))
			lp_budget_spent(l);
		pthread_mutex_unlock(&l->lock);
	}
}

void lp_channel_update_epoll(struct lp_channel *l)
{
	struct epoll_event event = {.data.u64 = (uintptr_t)l | 1};
	uint32_t wanted = l->stalled ? 0 : EPOLLIN;

	pthread_mutex_lock(&l->lock);
	if (l->out_nr)
		wanted |= EPOLLOUT;
	pthread_mutex_unlock(&l->lock);
	event.events = wanted;
	if (l->ended || wanted == l->events_wanted)
		return;
	/* epoll always reports EPOLLHUP and EPOLLERR (epoll_ctl(2)); if no event is wanted, remove the fd. */
	if (epoll_ctl(l->channels->epfd,
		      !wanted		 ? EPOLL_CTL_DEL
		      : l->events_wanted ? EPOLL_CTL_MOD
					 : EPOLL_CTL_ADD,
		      l->fd, &event))
		lp_channel_end(l, errno);
	l->events_wanted = wanted;
}
