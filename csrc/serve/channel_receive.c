#include "channel_receive.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "channel_requests.h"
#include "common/clock.h"
#include "common/page.h"
#include "common/page_protocol.h"
#include "deferred_pages.h"

#define RECEIVE_MOST ((size_t)256 << 10) /* bytes received from one channel before the serving thread handles faults again */
/* Events of one piece of an answer: ARRIVED and REFUSED. */
#define PIECE_EVENTS 2

/* Removes the first pages of the oldest request from the pages in flight (lock held). */
static void remove_in_flight(struct lp_channel *l, uint64_t nr_pages)
{
	struct lp_request *head = lp_request_at(l, 0);

	head->dump_addr += nr_pages << LP_PAGE_SHIFT;
	head->nr_pages -= nr_pages;
	if (head->urgent)
		l->urgent -= nr_pages << LP_PAGE_SHIFT;
	else
		l->background -= nr_pages << LP_PAGE_SHIFT;
}

/*
 * Removes the oldest request.  Reports a refusal, and requests the missing pages of a short answer again; not after CLOSE: no
 * server answers then, and the status would be taken for an answer.
 */
static void answer_complete(struct lp_channel *l)
{
	struct lp_request rest; /* the pages that the answer lacks */

	pthread_mutex_lock(&l->lock);
	rest = *lp_request_at(l, 0);
	lp_pace_answered(&l->pace, rest.sent, rest.delivered, lp_now_ns(), l->answered << LP_PAGE_SHIFT);
	remove_in_flight(l, rest.nr_pages);
	l->first = (l->first + 1) & (l->cap - 1);
	l->nr--;
	if (!l->answered)
		lp_add_event(l, (struct lp_channel_event){
				     .kind = LP_CHANNEL_REFUSED,
				     .reported = rest.reported,
				     .tag = rest.tag,
				     .dump_addr = rest.dump_addr,
				     .nr_pages = rest.nr_pages,
				     .since = rest.since,
			     });
	else if (rest.nr_pages && !l->finishing) /* a short answer; the slot of the answered request is free */
		lp_request_pages(l, rest.tag, rest.dump_addr, rest.nr_pages, rest.since, rest.urgent, rest.reported);
	if (!l->nr && l->paused)
		lp_add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_QUIET});
	pthread_mutex_unlock(&l->lock);
}

/* Places or defers the next pages of the answer.  Returns 0 or -EAGAIN. */
static int place_answer(struct lp_channel *l, uint64_t nr_pages, const char *bytes)
{
	struct lp_request head;
	int rc;

	pthread_mutex_lock(&l->lock);
	head = *lp_request_at(l, 0);
	pthread_mutex_unlock(&l->lock);
	rc = l->channels->tasks.place(l->channels->tasks.arg, head.tag, head.dump_addr, nr_pages, bytes);
	if (rc)
		rc = lp_defer_pages(l->channels, head.tag, head.dump_addr, nr_pages, bytes);
	if (rc)
		return rc;
	l->missing -= nr_pages;
	pthread_mutex_lock(&l->lock);
	l->nr_pages += nr_pages;
	if (lp_request_at(l, 0)->reported)
		lp_add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_ARRIVED,
						    .tag = head.tag,
						    .dump_addr = head.dump_addr,
						    .nr_pages = nr_pages});
	remove_in_flight(l, nr_pages);
	pthread_mutex_unlock(&l->lock);
	return 0;
}

/* Begins an answer.  False: it does not match the oldest request. */
static bool begin_answer(struct lp_channel *l, const struct lp_header *a)
{
	struct lp_request asked;

	pthread_mutex_lock(&l->lock);
	asked = *lp_request_at(l, 0);
	pthread_mutex_unlock(&l->lock);
	l->zeros = l->options.zeros && a->flags == LP_PAGES_ZERO;
	if (a->vaddr != asked.dump_addr || a->dst_id != asked.tag || a->nr_pages > asked.nr_pages)
		return false;
	if (a->command != LP_COMMAND_ADD_F && (a->command != LP_COMMAND_ADD || a->nr_pages))
		return false;
	if (a->nr_pages && a->flags != LP_PAGES_PRESENT && !l->zeros)
		return false;
	l->missing = l->answered = a->nr_pages;
	return true;
}

/* Parses the received bytes, and places their pages.  False: the channel is stalled, or has ended. */
static bool process_received(struct lp_channel *l)
{
	for (;;) {
		size_t available = l->end - l->start;
		struct lp_header answer;
		int32_t status;
		size_t nr;
		bool closing, room;

		/* Received pages must be reported, so make room for the events first. */
		pthread_mutex_lock(&l->lock);
		room = lp_room_for_events(l, PIECE_EVENTS) && lp_room_to_ask(l);
		pthread_mutex_unlock(&l->lock);
		if (!room) {
			lp_channel_end(l, ENOMEM);
			return false;
		}
		if (l->missing) {
			uint64_t pages = l->zeros ? LP_ZERO_PAGES : available >> LP_PAGE_SHIFT;

			if (pages > l->missing)
				pages = l->missing;
			if (!pages)
				return true;
			if (place_answer(l, pages, l->zeros ? lp_zero_pages : l->buffer + l->start)) {
				l->stalled = true;
				return false;
			}
			if (!l->zeros)
				l->start += pages << LP_PAGE_SHIFT;
			if (!l->missing)
				answer_complete(l);
			continue;
		}
		pthread_mutex_lock(&l->lock);
		nr = l->nr;
		closing = l->finishing && !l->closed;
		pthread_mutex_unlock(&l->lock);
		if (nr) {
			if (available < l->options.header_size)
				return true;
			answer = lp_header_read(l->options.header_size, l->buffer + l->start);
			if (!begin_answer(l, &answer)) {
				lp_channel_end(l, answer.command == LP_COMMAND_COMPLETED ? ESTALE : EPROTO);
				return false;
			}
			l->start += l->options.header_size;
			if (!l->missing)
				answer_complete(l);
			continue;
		}
		if (available < sizeof(status))
			return true;
		memcpy(&status, l->buffer + l->start, sizeof(status));
		if (!closing) { /* data without a request */
			lp_channel_end(l, status == LP_COMMAND_COMPLETED ? ESTALE : EPROTO);
			return false;
		}
		l->start += sizeof(status);
		pthread_mutex_lock(&l->lock);
		l->closed = true;
		lp_add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_CLOSED, .status = status});
		pthread_mutex_unlock(&l->lock);
	}
}

static void note_received(struct lp_channel *l, size_t bytes)
{
	uint64_t now = lp_now_ns();

	pthread_mutex_lock(&l->lock);
	l->heard = now;
	l->nr_bytes += bytes;
	if (l->paused)
		lp_add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_HEARD});
	pthread_mutex_unlock(&l->lock);
}

void lp_channel_receive(struct lp_channel *l)
{
	size_t got = 0;
	ssize_t n;

	while (!l->ended && process_received(l) && got < RECEIVE_MOST) {
		if (l->start == l->end) {
			/* so that pages that follow a header are page-aligned */
			l->start = l->end = LP_PAGE_SIZE - (l->missing ? 0 : l->options.header_size);
		} else if (LP_CHANNEL_BUFFER - l->end < LP_PAGE_SIZE + LP_HEADER_NEW) {
			memmove(l->buffer + LP_PAGE_SIZE, l->buffer + l->start, l->end - l->start);
			l->end = LP_PAGE_SIZE + l->end - l->start;
			l->start = LP_PAGE_SIZE;
		}
		n = recv(l->fd, l->buffer + l->end, LP_CHANNEL_BUFFER - l->end, MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			lp_channel_end(l, atomic_load(&l->failed) ? ENOMEM : n ? errno : 0);
			return;
		}
		l->end += (size_t)n;
		got += (size_t)n;
		note_received(l, (size_t)n);
	}
}
