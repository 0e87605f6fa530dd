/*
 * What a channel keeps: its outstanding requests and the headers that are to be sent, the events for its owner, and the end.
 *
 * The functions are called with the channel's lock, but for lp_channel_end and lp_channel_free.
 */
#ifndef LAZYPAGES_CHANNEL_REQUESTS_H
#define LAZYPAGES_CHANNEL_REQUESTS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "channels.h"
#include "common/page_protocol.h"
#include "pace.h"

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

/* The i-th outstanding request, 0: the oldest. */
static inline struct lp_request *lp_request_at(struct lp_channel *l, size_t i)
{
	return &l->requests[(l->first + i) & (l->cap - 1)];
}

/* Makes room for one more request, and for its header.  False: no memory. */
bool lp_room_to_ask(struct lp_channel *l);
/* Adds a header to what is sent.  The caller has made room with lp_room_to_ask(). */
void lp_send_later(struct lp_channel *l, struct lp_header header);
/* Adds a request.  False: no memory, and nothing was changed. */
bool lp_request_pages(struct lp_channel *l, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since, bool urgent,
		      bool reported);
/* Makes room for nr events, besides the last ones.  False: no memory. */
bool lp_room_for_events(struct lp_channel *l, size_t nr);
/* Adds an event.  The caller has made room, but for HEARD, which may be dropped. */
void lp_add_event(struct lp_channel *l, struct lp_channel_event event);
/* Withdraws the budget, if there is one, and reports it. */
void lp_budget_spent(struct lp_channel *l);
/* Ends the channel and reports it; status: as LP_CHANNEL_ENDED has it.  (the serving thread, no lock) */
void lp_channel_end(struct lp_channel *l, int status);
/* Frees a channel that no thread uses any more. */
void lp_channel_free(struct lp_channel *l);

#endif
