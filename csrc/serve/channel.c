#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel_receive.h"
#include "channel_requests.h"
#include "channels.h"
#include "common/clock.h"
#include "common/page.h"
#include "common/page_protocol.h"
#include "deferred_pages.h"
#include "wakeup_fd.h"

struct lp_channel *lp_channel_new(struct lp_channels *channels, int fd, const struct lp_channel_options *options)
{
	struct lp_channel *l = calloc(1, sizeof(*l));

	if (!l)
		return NULL;
	pthread_mutex_init(&l->lock, NULL);
	l->channels = channels;
	l->options = *options;
	lp_pace_init(&l->pace);
	l->heard = lp_now_ns();
	l->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	l->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->buffer = aligned_alloc(LP_PAGE_SIZE, LP_CHANNEL_BUFFER);
	if (l->fd < 0 || l->eventfd < 0 || !l->buffer || !lp_make_zero_pages() || !lp_room_for_events(l, 0)) {
		int saved = errno;

		lp_channel_free(l);
		errno = saved;
		return NULL;
	}
	l->start = l->end = LP_PAGE_SIZE;
	l->next = atomic_load(&channels->fresh);
	while (!atomic_compare_exchange_weak(&channels->fresh, &l->next, l))
		;
	lp_wakeup(channels->wakefd);
	return l;
}

void lp_channel_close(struct lp_channel *l)
{
	int wakefd = l->channels->wakefd;

	shutdown(l->fd, SHUT_RDWR);
	atomic_store(&l->dead, true);
	lp_wakeup(wakefd);
}

int lp_channel_event_fd(const struct lp_channel *l)
{
	return l->eventfd;
}

size_t lp_channel_events(struct lp_channel *l, struct lp_channel_event *events, size_t max)
{
	size_t nr;

	pthread_mutex_lock(&l->lock);
	lp_wakeup_clear(l->eventfd);
	nr = l->nr_events < max ? l->nr_events : max;
	if (nr)
		memcpy(events, l->events, nr * sizeof(*events));
	memmove(l->events, l->events + nr, (l->nr_events - nr) * sizeof(*events));
	l->nr_events -= nr;
	if (l->nr_events)
		lp_wakeup(l->eventfd);
	pthread_mutex_unlock(&l->lock);
	return nr;
}

/* Makes lp_channel_receive() end the channel; the owner then takes the outstanding requests. */
static void fail(struct lp_channel *l)
{
	atomic_store(&l->failed, true);
	shutdown(l->fd, SHUT_RDWR);
}

void lp_channel_ask(struct lp_channel *l, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, bool urgent)
{
	pthread_mutex_lock(&l->lock);
	if (!l->finishing && !lp_request_pages(l, tag, dump_addr, nr_pages, 0, urgent, true))
		fail(l);
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

void lp_channel_pause(struct lp_channel *l, bool paused)
{
	pthread_mutex_lock(&l->lock);
	l->paused = paused;
	if (paused)
		lp_budget_spent(l);
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

void lp_channel_set_budget(struct lp_channel *l, struct lp_task *task, uint64_t max_bytes)
{
	pthread_mutex_lock(&l->lock);
	if (lp_room_for_events(l, 1)) { /* each budget is reported as spent, and those before it may not have been taken yet */
		l->spender = task;
		l->budget_left = (max_bytes + LP_PAGE_SIZE - 1) >> LP_PAGE_SHIFT;
		l->budget_asked = 0;
		if (l->ended || l->paused || l->finishing)
			lp_budget_spent(l);
	} else {
		fail(l);
	}
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

void lp_channel_finish(struct lp_channel *l, bool force, uint32_t flags)
{
	pthread_mutex_lock(&l->lock);
	l->finishing = true;
	lp_budget_spent(l);
	if (lp_room_to_ask(l))
		lp_send_later(l, (struct lp_header){.command = force ? LP_COMMAND_FORCE_CLOSE : LP_COMMAND_CLOSE, .flags = flags});
	else
		fail(l);
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

size_t lp_channel_outstanding(struct lp_channel *l, struct lp_request *requests, size_t max)
{
	size_t nr;

	pthread_mutex_lock(&l->lock);
	nr = l->nr;
	for (size_t i = 0; i < nr && i < max; i++) {
		requests[i] = *lp_request_at(l, i);
		if (nr <= max)
			lp_request_at(l, i)->reported = true;
	}
	pthread_mutex_unlock(&l->lock);
	return nr;
}

void lp_channel_state(struct lp_channel *l, struct lp_channel_state *state)
{
	pthread_mutex_lock(&l->lock);
	*state = (struct lp_channel_state){
		.outstanding = l->nr,
		.urgent = l->urgent,
		.background = l->background,
		.limit = l->pace.limit > l->options.floor ? l->pace.limit : l->options.floor,
		.heard = l->heard,
		.requests = l->nr_requests,
		.pages = l->nr_pages,
		.bytes = l->nr_bytes,
		.round_trip = l->pace.smoothed,
	};
	for (size_t i = 0; i < l->nr; i++) {
		uint64_t since = lp_request_at(l, i)->since;

		if (since && (!state->oldest || since < state->oldest))
			state->oldest = since;
	}
	pthread_mutex_unlock(&l->lock);
}
