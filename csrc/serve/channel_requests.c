#include "channel_requests.h"

#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/page.h"
#include "common/page_protocol.h"
#include "wakeup_fd.h"

/* Reserved for BUDGET_SPENT, QUIET, CLOSED and ENDED, which must not fail for lack of memory. */
#define LAST_EVENTS 4

/* Makes room for nr elements in an array.  False: no memory, and the array is unchanged. */
static bool grow(void *array_pointer, size_t nr, size_t *cap, size_t size)
{
	void **array = array_pointer, *more;
	size_t larger = *cap ? *cap : 64;

	while (larger < nr)
		larger *= 2;
	if (larger == *cap)
		return true;
	more = realloc(*array, larger * size);
	if (!more)
		return false;
	*array = more;
	*cap = larger;
	return true;
}

bool lp_room_to_ask(struct lp_channel *l)
{
	if (l->nr == l->cap) {
		size_t cap = l->cap ? l->cap * 2 : 64;
		struct lp_request *ring = malloc(cap * sizeof(*ring));

		if (!ring)
			return false;
		for (size_t i = 0; i < l->nr; i++)
			ring[i] = *lp_request_at(l, i);
		free(l->requests);
		l->requests = ring;
		l->first = 0;
		l->cap = cap;
	}
	return grow(&l->out, l->out_nr + LP_HEADER_NEW, &l->out_cap, 1);
}

void lp_send_later(struct lp_channel *l, struct lp_header header)
{
	lp_header_write(l->options.header_size, l->out + l->out_nr, header);
	l->out_nr += l->options.header_size;
}

bool lp_request_pages(struct lp_channel *l, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since, bool urgent, bool reported)
{
	uint64_t now = lp_now_ns();

	if (!lp_room_to_ask(l))
		return false;
	if (!l->nr)
		l->heard = now;
	*lp_request_at(l, l->nr++) = (struct lp_request){
		.tag = tag,
		.dump_addr = dump_addr,
		.nr_pages = nr_pages,
		.since = since,
		.sent = now,
		.delivered = l->pace.delivered,
		.urgent = urgent,
		.reported = reported,
	};
	if (urgent) {
		l->urgent += nr_pages << LP_PAGE_SHIFT;
		l->last_urgent = now;
	} else {
		l->background += nr_pages << LP_PAGE_SHIFT;
	}
	l->nr_requests++;
	lp_send_later(l, (struct lp_header){
			      .command = LP_COMMAND_GET,
			      .flags = l->options.compress && !urgent ? LP_PAGES_ZSTD : 0,
			      .nr_pages = nr_pages,
			      .vaddr = dump_addr,
			      .dst_id = tag,
		      });
	return true;
}

bool lp_room_for_events(struct lp_channel *l, size_t nr)
{
	return grow(&l->events, l->nr_events + nr + LAST_EVENTS, &l->cap_events, sizeof(*l->events));
}

void lp_add_event(struct lp_channel *l, struct lp_channel_event event)
{
	if (event.kind == LP_CHANNEL_HEARD && l->nr_events && l->events[l->nr_events - 1].kind == LP_CHANNEL_HEARD)
		return;
	/* Room for all other kinds was reserved before.  HEARD may be dropped: the next received bytes report it again. */
	if (event.kind == LP_CHANNEL_HEARD && !lp_room_for_events(l, 1))
		return;
	l->events[l->nr_events++] = event;
	if (l->nr_events == 1)
		lp_wakeup(l->eventfd);
}

void lp_budget_spent(struct lp_channel *l)
{
	if (!l->spender)
		return;
	l->spender = NULL;
	lp_add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_BUDGET_SPENT, .nr_pages = l->budget_asked});
}

void lp_channel_end(struct lp_channel *l, int status)
{
	pthread_mutex_lock(&l->lock);
	l->ended = true;
	lp_budget_spent(l);
	lp_add_event(l, (struct lp_channel_event){
			     .kind = LP_CHANNEL_ENDED,
			     .status = status,
			     .at_boundary = l->start == l->end && !l->missing,
		     });
	pthread_mutex_unlock(&l->lock);
	epoll_ctl(l->channels->epfd, EPOLL_CTL_DEL, l->fd, NULL);
}

void lp_channel_free(struct lp_channel *l)
{
	if (l->fd >= 0)
		close(l->fd);
	if (l->eventfd >= 0)
		close(l->eventfd);
	free(l->buffer);
	free(l->requests);
	free(l->out);
	free(l->events);
	pthread_mutex_destroy(&l->lock);
	free(l);
}
