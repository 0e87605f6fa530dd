#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/page.h"
#include "common/page_protocol.h"
#include "pace.h"
#include "wakeup_fd.h"

#define BUFFER ((size_t)256 << 10) /* bytes of the receive buffer */
#define RECEIVE_MOST ((size_t)256 << 10) /* bytes received from one channel before the serving thread handles faults again */
#define ZERO_PAGES 64ull		 /* pages of zeros that are placed at once */
#define DEFERRED_MOST ((size_t)4 << 20)	 /* bytes of deferred pages; above, the channels stop receiving */
/* Reserved for BUDGET_SPENT, QUIET, CLOSED and ENDED, which must not fail for lack of memory. */
#define LAST_EVENTS 4
/* Events of one piece of an answer: ARRIVED and REFUSED. */
#define PIECE_EVENTS 2
#define MIN_PAGES 4ull /* of a background request */
/*
 * Bytes of background in flight while faults share the channel: two requests, so that the server always has one.  A fault waits
 * for them.  With a smaller limit fewer faults find their page already there, and the transfer takes longer (measured with CRIU's
 * server on loopback).
 */
#define BUSY_LIMIT ((uint64_t)512 << 10)
#define BUSY_NS (2 * LP_NS / 1000)		 /* the channel counts as shared for so long after a fault */

struct lp_channel {
	struct lp_channels *channels;
	struct lp_channel *next;
	int fd, eventfd;
	struct lp_channel_options options;
	_Atomic bool dead; /* lp_channel_close was called */

	/* Used by the serving thread only. */
	char *buffer;
	size_t start, end;	/* of the received bytes that have not been parsed */
	uint64_t missing, answered; /* pages of the current answer: not yet placed, in all */
	bool zeros;		/* the current answer has no bytes */
	bool stalled;		/* received pages can be neither placed nor deferred at the moment */
	bool claim_later;	/* the next background pages can't be claimed at the moment */
	uint32_t events_wanted; /* of epoll */

	pthread_mutex_t lock; /* protects all that follows */
	_Atomic bool paused, ended, finishing; /* read without the lock, too */
	_Atomic bool failed; /* no memory for a request of the owner's: the channel ends with ENOMEM */
	bool closed;
	struct lp_request *requests; /* a ring, oldest first */
	size_t first, nr, cap;
	char *out;
	size_t out_nr, out_cap;
	_Atomic uint64_t urgent; /* read without the lock, too */
	uint64_t background, heard, last_urgent;
	uint64_t nr_requests, nr_pages, nr_bytes;
	struct lp_pace pace;
	struct lp_task *spender;
	uint64_t budget_left, budget_asked; /* pages */
	struct lp_channel_event *events;
	size_t nr_events, cap_events;
};

static const char *zero_pages;

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

/* ---- outstanding requests (lock held) ---- */

static struct lp_request *request_at(struct lp_channel *l, size_t i)
{
	return &l->requests[(l->first + i) & (l->cap - 1)];
}

/* Makes room for one more request, and for its header.  False: no memory. */
static bool room_to_ask(struct lp_channel *l)
{
	if (l->nr == l->cap) {
		size_t cap = l->cap ? l->cap * 2 : 64;
		struct lp_request *ring = malloc(cap * sizeof(*ring));

		if (!ring)
			return false;
		for (size_t i = 0; i < l->nr; i++)
			ring[i] = *request_at(l, i);
		free(l->requests);
		l->requests = ring;
		l->first = 0;
		l->cap = cap;
	}
	return grow(&l->out, l->out_nr + LP_HEADER_NEW, &l->out_cap, 1);
}

/* The caller has made room with room_to_ask(). */
static void send_later(struct lp_channel *l, struct lp_header header)
{
	lp_header_write(l->options.header_size, l->out + l->out_nr, header);
	l->out_nr += l->options.header_size;
}

/* Adds a request.  False: no memory, and nothing was changed. */
static bool ask(struct lp_channel *l, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since, bool urgent, bool reported)
{
	uint64_t now = lp_now_ns();

	if (!room_to_ask(l))
		return false;
	if (!l->nr)
		l->heard = now;
	*request_at(l, l->nr++) = (struct lp_request){
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
	send_later(l, (struct lp_header){
			      .command = LP_COMMAND_GET,
			      .flags = l->options.compress && !urgent ? LP_PAGES_ZSTD : 0,
			      .nr_pages = nr_pages,
			      .vaddr = dump_addr,
			      .dst_id = tag,
		      });
	return true;
}

static bool room_for_events(struct lp_channel *l, size_t nr)
{
	return grow(&l->events, l->nr_events + nr + LAST_EVENTS, &l->cap_events, sizeof(*l->events));
}

static void add_event(struct lp_channel *l, struct lp_channel_event event)
{
	if (event.kind == LP_CHANNEL_HEARD && l->nr_events && l->events[l->nr_events - 1].kind == LP_CHANNEL_HEARD)
		return;
	/* Room for all other kinds was reserved before.  HEARD may be dropped: the next received bytes report it again. */
	if (event.kind == LP_CHANNEL_HEARD && !room_for_events(l, 1))
		return;
	l->events[l->nr_events++] = event;
	if (l->nr_events == 1)
		lp_wakeup(l->eventfd);
}

static void budget_spent(struct lp_channel *l)
{
	if (!l->spender)
		return;
	l->spender = NULL;
	add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_BUDGET_SPENT, .nr_pages = l->budget_asked});
}

static void end_channel(struct lp_channel *l, int status)
{
	pthread_mutex_lock(&l->lock);
	l->ended = true;
	budget_spent(l);
	add_event(l, (struct lp_channel_event){
			     .kind = LP_CHANNEL_ENDED,
			     .status = status,
			     .at_boundary = l->start == l->end && !l->missing,
		     });
	pthread_mutex_unlock(&l->lock);
	epoll_ctl(l->channels->epfd, EPOLL_CTL_DEL, l->fd, NULL);
}

/* ---- deferred pages ---- */

/* While the layout of a task changes, its received pages are deferred, so that the following pages reach the other tasks. */
struct lp_deferred_pages {
	struct lp_deferred_pages *next;
	uint64_t tag, dump_addr, nr_pages;
	bool zeros; /* no bytes */
	_Alignas(16) char bytes[];
};

/* Returns 0, or -EAGAIN if there is no room. */
static int defer(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const char *bytes)
{
	size_t size = bytes == zero_pages ? 0 : nr_pages << LP_PAGE_SHIFT;
	struct lp_deferred_pages *p = NULL;

	if (channels->deferred_bytes + sizeof(*p) + size <= DEFERRED_MOST)
		p = malloc(sizeof(*p) + size);
	if (!p)
		return -EAGAIN;
	*p = (struct lp_deferred_pages){.tag = tag, .dump_addr = dump_addr, .nr_pages = nr_pages, .zeros = !size};
	memcpy(p->bytes, bytes, size);
	channels->deferred_bytes += sizeof(*p) + size;
	*channels->last_deferred = p;
	channels->last_deferred = &p->next;
	return 0;
}

static void drop_deferred(struct lp_channels *channels, struct lp_deferred_pages **link)
{
	struct lp_deferred_pages *p = *link;

	*link = p->next;
	if (!p->next)
		channels->last_deferred = link;
	channels->deferred_bytes -= sizeof(*p) + (p->zeros ? 0 : p->nr_pages << LP_PAGE_SHIFT);
	free(p);
}

/* Places the deferred pages of the tasks that accept them now.  After a failure the other pages of that task are not tried. */
static void place_deferred(struct lp_channels *channels)
{
	const struct lp_deferred_pages *refused = NULL;
	struct lp_deferred_pages **link = &channels->deferred, *p;

	while ((p = *link)) {
		if ((refused && refused->tag == p->tag) ||
		    channels->tasks.place(channels->tasks.arg, p->tag, p->dump_addr, p->nr_pages, p->zeros ? zero_pages : p->bytes)) {
			refused = p;
			link = &p->next;
		} else {
			drop_deferred(channels, link);
		}
	}
}

/* ---- receiving ---- */

/* Removes the first pages of the oldest request from the pages in flight (lock held). */
static void remove_in_flight(struct lp_channel *l, uint64_t nr_pages)
{
	struct lp_request *head = request_at(l, 0);

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
	rest = *request_at(l, 0);
	lp_pace_answered(&l->pace, rest.sent, rest.delivered, lp_now_ns(), l->answered << LP_PAGE_SHIFT);
	remove_in_flight(l, rest.nr_pages);
	l->first = (l->first + 1) & (l->cap - 1);
	l->nr--;
	if (!l->answered)
		add_event(l, (struct lp_channel_event){
				     .kind = LP_CHANNEL_REFUSED,
				     .reported = rest.reported,
				     .tag = rest.tag,
				     .dump_addr = rest.dump_addr,
				     .nr_pages = rest.nr_pages,
				     .since = rest.since,
			     });
	else if (rest.nr_pages && !l->finishing) /* a short answer; the slot of the answered request is free */
		ask(l, rest.tag, rest.dump_addr, rest.nr_pages, rest.since, rest.urgent, rest.reported);
	if (!l->nr && l->paused)
		add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_QUIET});
	pthread_mutex_unlock(&l->lock);
}

/* Places or defers the next pages of the answer.  Returns 0 or -EAGAIN. */
static int place_answer(struct lp_channel *l, uint64_t nr_pages, const char *bytes)
{
	struct lp_request head;
	int rc;

	pthread_mutex_lock(&l->lock);
	head = *request_at(l, 0);
	pthread_mutex_unlock(&l->lock);
	rc = l->channels->tasks.place(l->channels->tasks.arg, head.tag, head.dump_addr, nr_pages, bytes);
	if (rc)
		rc = defer(l->channels, head.tag, head.dump_addr, nr_pages, bytes);
	if (rc)
		return rc;
	l->missing -= nr_pages;
	pthread_mutex_lock(&l->lock);
	l->nr_pages += nr_pages;
	if (request_at(l, 0)->reported)
		add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_ARRIVED,
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
	asked = *request_at(l, 0);
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
		room = room_for_events(l, PIECE_EVENTS) && room_to_ask(l);
		pthread_mutex_unlock(&l->lock);
		if (!room) {
			end_channel(l, ENOMEM);
			return false;
		}
		if (l->missing) {
			uint64_t pages = l->zeros ? ZERO_PAGES : available >> LP_PAGE_SHIFT;

			if (pages > l->missing)
				pages = l->missing;
			if (!pages)
				return true;
			if (place_answer(l, pages, l->zeros ? zero_pages : l->buffer + l->start)) {
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
				end_channel(l, answer.command == LP_COMMAND_COMPLETED ? ESTALE : EPROTO);
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
			end_channel(l, status == LP_COMMAND_COMPLETED ? ESTALE : EPROTO);
			return false;
		}
		l->start += sizeof(status);
		pthread_mutex_lock(&l->lock);
		l->closed = true;
		add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_CLOSED, .status = status});
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
		add_event(l, (struct lp_channel_event){.kind = LP_CHANNEL_HEARD});
	pthread_mutex_unlock(&l->lock);
}

/* Receives and processes up to RECEIVE_MOST bytes. */
static void receive(struct lp_channel *l)
{
	size_t got = 0;
	ssize_t n;

	while (!l->ended && process_received(l) && got < RECEIVE_MOST) {
		if (l->start == l->end) {
			/* so that pages that follow a header are page-aligned */
			l->start = l->end = LP_PAGE_SIZE - (l->missing ? 0 : l->options.header_size);
		} else if (BUFFER - l->end < LP_PAGE_SIZE + LP_HEADER_NEW) {
			memmove(l->buffer + LP_PAGE_SIZE, l->buffer + l->start, l->end - l->start);
			l->end = LP_PAGE_SIZE + l->end - l->start;
			l->start = LP_PAGE_SIZE;
		}
		n = recv(l->fd, l->buffer + l->end, BUFFER - l->end, MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			end_channel(l, atomic_load(&l->failed) ? ENOMEM : n ? errno : 0);
			return;
		}
		l->end += (size_t)n;
		got += (size_t)n;
		note_received(l, (size_t)n);
	}
}

/* ---- sending ---- */

static void flush(struct lp_channel *l)
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
		l->out_nr = 0; /* receive() finds the error, after the data that has already arrived */
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

/* Requests background pages, as many as the budget and the window allow. */
static void request_background(struct lp_channel *l)
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
		if (nr > 0 && (l->paused || l->finishing || !ask(l, tag, dump_addr, (uint64_t)nr, 0, false, false))) {
			l->claim_later = !l->paused && !l->finishing; /* ask() found no memory: try again */
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
			budget_spent(l);
		pthread_mutex_unlock(&l->lock);
	}
}

static void update_epoll(struct lp_channel *l)
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
		end_channel(l, errno);
	l->events_wanted = wanted;
}

/* ---- the serving thread ---- */

void lp_channels_init(struct lp_channels *channels, int epfd, int wakefd, const struct lp_channel_tasks *tasks)
{
	*channels = (struct lp_channels){.epfd = epfd, .wakefd = wakefd, .tasks = *tasks};
	channels->last_deferred = &channels->deferred;
}

static void channel_free(struct lp_channel *l)
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

void lp_channels_free(struct lp_channels *channels)
{
	struct lp_channel *l = channels->channels, *fresh = atomic_load(&channels->fresh), *next;

	for (; l; l = next) {
		next = l->next;
		channel_free(l);
	}
	for (l = fresh; l; l = next) {
		next = l->next;
		channel_free(l);
	}
	channels->channels = NULL;
	while (channels->deferred)
		drop_deferred(channels, &channels->deferred);
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
			end_channel(l, errno);
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
	for (const struct lp_deferred_pages *p = channels->deferred; p; p = p->next) {
		uint64_t until = p->dump_addr + (p->nr_pages << LP_PAGE_SHIFT);

		if (p->tag != tag || until <= dump_addr || p->dump_addr >= *end)
			continue;
		if (p->dump_addr <= dump_addr && until < *end)
			*end = until;
		if (p->dump_addr <= dump_addr)
			return true;
		*end = p->dump_addr;
	}
	for (struct lp_channel *l = channels->channels; l; l = l->next) {
		pthread_mutex_lock(&l->lock);
		for (size_t i = 0; i < l->nr && !l->ended; i++) {
			struct lp_request *r = request_at(l, i);
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
				ask(best, tag, dump_addr, (stop - dump_addr) >> LP_PAGE_SHIFT, since, true, false);
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
			budget_spent(l);
		pthread_mutex_unlock(&l->lock);
	}
}

void lp_channel_ready(struct lp_channel *l)
{
	if (!atomic_load(&l->dead))
		receive(l);
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
	place_deferred(channels);
	for (link = &channels->channels; (l = *link);) {
		if (atomic_load(&l->dead)) {
			*link = l->next;
			epoll_ctl(channels->epfd, EPOLL_CTL_DEL, l->fd, NULL);
			channel_free(l);
			continue;
		}
		if (l->stalled) {
			l->stalled = false;
			receive(l);
		}
		l->claim_later = false;
		request_background(l);
		flush(l);
		update_epoll(l);
		again |= l->stalled || l->claim_later;
		link = &l->next;
	}
	return again || channels->deferred;
}

/* ---- owner ---- */

struct lp_channel *lp_channel_new(struct lp_channels *channels, int fd, const struct lp_channel_options *options)
{
	struct lp_channel *l = calloc(1, sizeof(*l));

	if (!l)
		return NULL;
	if (!zero_pages) {
		void *zeros = mmap(NULL, ZERO_PAGES << LP_PAGE_SHIFT, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		zero_pages = zeros == MAP_FAILED ? NULL : zeros;
	}
	pthread_mutex_init(&l->lock, NULL);
	l->channels = channels;
	l->options = *options;
	lp_pace_init(&l->pace);
	l->heard = lp_now_ns();
	l->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	l->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->buffer = aligned_alloc(LP_PAGE_SIZE, BUFFER);
	if (l->fd < 0 || l->eventfd < 0 || !l->buffer || !zero_pages || !room_for_events(l, 0)) {
		int saved = errno;

		channel_free(l);
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

/* Makes receive() end the channel; the owner then takes the outstanding requests. */
static void fail(struct lp_channel *l)
{
	atomic_store(&l->failed, true);
	shutdown(l->fd, SHUT_RDWR);
}

void lp_channel_ask(struct lp_channel *l, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, bool urgent)
{
	pthread_mutex_lock(&l->lock);
	if (!l->finishing && !ask(l, tag, dump_addr, nr_pages, 0, urgent, true))
		fail(l);
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

void lp_channel_pause(struct lp_channel *l, bool paused)
{
	pthread_mutex_lock(&l->lock);
	l->paused = paused;
	if (paused)
		budget_spent(l);
	pthread_mutex_unlock(&l->lock);
	lp_wakeup(l->channels->wakefd);
}

void lp_channel_set_budget(struct lp_channel *l, struct lp_task *task, uint64_t max_bytes)
{
	pthread_mutex_lock(&l->lock);
	if (room_for_events(l, 1)) { /* each budget is reported as spent, and those before it may not have been taken yet */
		l->spender = task;
		l->budget_left = (max_bytes + LP_PAGE_SIZE - 1) >> LP_PAGE_SHIFT;
		l->budget_asked = 0;
		if (l->ended || l->paused || l->finishing)
			budget_spent(l);
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
	budget_spent(l);
	if (room_to_ask(l))
		send_later(l, (struct lp_header){.command = force ? LP_COMMAND_FORCE_CLOSE : LP_COMMAND_CLOSE, .flags = flags});
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
		requests[i] = *request_at(l, i);
		if (nr <= max)
			request_at(l, i)->reported = true;
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
		uint64_t since = request_at(l, i)->since;

		if (since && (!state->oldest || since < state->oldest))
			state->oldest = since;
	}
	pthread_mutex_unlock(&l->lock);
}
