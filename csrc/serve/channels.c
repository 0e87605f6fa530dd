#include "channels.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>

#include "channel_receive.h"
#include "channel_requests.h"
#include "channel_send.h"
#include "common/page.h"
#include "deferred_pages.h"

void lp_channels_init(struct lp_channels *channels, int epfd, int wakefd, const struct lp_channel_tasks *tasks)
{
	*channels = (struct lp_channels){.epfd = epfd, .wakefd = wakefd, .tasks = *tasks};
	channels->last_deferred = &channels->deferred;
}

void lp_channels_free(struct lp_channels *channels)
{
	struct lp_channel *l = channels->channels, *fresh = atomic_load(&channels->fresh), *next;

	for (; l; l = next) {
		next = l->next;
		lp_channel_free(l);
	}
	for (l = fresh; l; l = next) {
		next = l->next;
		lp_channel_free(l);
	}
	channels->channels = NULL;
	lp_drop_deferred_pages(channels);
}

static void adopt_new(struct lp_channels *channels)
{
	struct lp_channel *l, *next;

	if (!atomic_load(&channels->fresh))
		return;
	for (l = atomic_exchange(&channels->fresh, NULL); l; l = next) {
		struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uintptr_t)l | 1};

		next = l->next;
		l->next = channels->channels;
		channels->channels = l;
		l->events_wanted = event.events;
		if (epoll_ctl(channels->epfd, EPOLL_CTL_ADD, l->fd, &event))
			lp_channel_end(l, errno);
	}
}

/* beside: another channel is for faults only, perhaps to the same server.  A channel with a floor then takes no faults. */
static bool takes_faults(const struct lp_channel *l, bool beside)
{
	return !(beside && l->options.floor) && !l->paused && !l->ended && !l->finishing && !atomic_load(&l->dead);
}

/*
 * Whether the page at dump_addr is in flight or deferred.  Shortens *end to the end of the run of pages from there for which the
 * result is the same.  (no lock held)
 */
static bool in_flight(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t *end, uint64_t since)
{
	if (lp_pages_are_deferred(channels, tag, dump_addr, end))
		return true;
	for (struct lp_channel *l = channels->channels; l; l = l->next) {
		pthread_mutex_lock(&l->lock);
		for (size_t i = 0; i < l->nr && !l->ended; i++) {
			struct lp_request *r = lp_request_at(l, i);
			uint64_t until = r->dump_addr + (r->nr_pages << LP_PAGE_SHIFT);

			if (r->tag != tag || r->reported || until <= dump_addr || r->dump_addr >= *end)
				continue;
			if (r->dump_addr > dump_addr) {
				*end = r->dump_addr;
				continue;
			}
			if (until < *end)
				*end = until;
			if (!r->since)
				r->since = since;
			pthread_mutex_unlock(&l->lock);
			return true;
		}
		pthread_mutex_unlock(&l->lock);
	}
	return false;
}

bool lp_channels_escalate(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t since)
{
	uint64_t end = dump_addr + LP_PAGE_SIZE;

	return in_flight(channels, tag, dump_addr, &end, since);
}

/* An estimate of the time until the answer to a request sent now, ns. */
static uint64_t expected_wait(struct lp_channel *l)
{
	uint64_t bytes, limit, wait;

	pthread_mutex_lock(&l->lock);
	bytes = l->urgent + l->background;
	limit = l->pace.limit;
	wait = l->pace.smoothed + l->pace.smoothed * bytes / limit;
	pthread_mutex_unlock(&l->lock);
	return wait;
}

bool lp_channels_fault(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since)
{
	uint64_t end = dump_addr + (nr_pages << LP_PAGE_SHIFT), best_wait = 0;
	struct lp_channel *best = NULL;
	bool beside = false;

	adopt_new(channels);
	for (struct lp_channel *l = channels->channels; l; l = l->next)
		beside |= !l->options.background && takes_faults(l, false);
	for (struct lp_channel *l = channels->channels; l; l = l->next) {
		uint64_t wait;

		if (!takes_faults(l, beside))
			continue;
		wait = channels->channels->next ? expected_wait(l) : 0;
		if (!best || wait < best_wait) {
			best = l;
			best_wait = wait;
		}
	}
	if (!best)
		return false;
	while (dump_addr < end) {
		uint64_t most = dump_addr + ((uint64_t)best->options.max_pages << LP_PAGE_SHIFT);
		uint64_t stop = end < most ? end : most;

		if (!in_flight(channels, tag, dump_addr, &stop, since)) {
			bool takes;

			pthread_mutex_lock(&best->lock);
			takes = takes_faults(best, false) &&
				lp_request_pages(best, tag, dump_addr, (stop - dump_addr) >> LP_PAGE_SHIFT, since, true, false);
			pthread_mutex_unlock(&best->lock);
			if (!takes)
				return false;
		}
		dump_addr = stop;
	}
	return true;
}

void lp_channels_forget(struct lp_channels *channels, const struct lp_task *task)
{
	adopt_new(channels); /* a new channel may have a budget already */
	for (struct lp_channel *l = channels->channels; l; l = l->next) {
		pthread_mutex_lock(&l->lock);
		if (l->spender == task)
			lp_budget_spent(l);
		pthread_mutex_unlock(&l->lock);
	}
}

void lp_channel_ready(struct lp_channel *l)
{
	if (!atomic_load(&l->dead))
		lp_channel_receive(l);
}

bool lp_channels_expect(const struct lp_channels *channels)
{
	for (const struct lp_channel *l = channels->channels; l; l = l->next)
		if (l->urgent)
			return true;
	return false;
}

bool lp_channels_round(struct lp_channels *channels)
{
	struct lp_channel **link, *l;
	bool again = false;

	adopt_new(channels);
	lp_place_deferred_pages(channels);
	for (link = &channels->channels; (l = *link);) {
		if (atomic_load(&l->dead)) {
			*link = l->next;
			epoll_ctl(channels->epfd, EPOLL_CTL_DEL, l->fd, NULL);
			lp_channel_free(l);
			continue;
		}
		if (l->stalled) {
			l->stalled = false;
			lp_channel_receive(l);
		}
		l->claim_later = false;
		lp_channel_request_background(l);
		lp_channel_flush(l);
		lp_channel_update_epoll(l);
		again |= l->stalled || l->claim_later;
		link = &l->next;
	}
	return again || channels->deferred;
}
