/*
 * A channel: a connection to a page server on which the serving thread requests the pages of faults, and background pages within
 * a budget.
 *
 * Its owner has connected it, and has detected the server's protocol.  The answers come in the order of the requests and are
 * checked against them; an answer that does not match ends the channel.  Events report to the owner what needs a decision: a page
 * that the server lacks, the end.  The owner also watches for silence.  It then requests the outstanding pages elsewhere.
 *
 * At most two threads use a channel: the owner calls these functions, the thread of lp_engine_run those of channels.h.
 */
#ifndef LAZYPAGES_CHANNEL_H
#define LAZYPAGES_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lp_task;
struct lp_channel;
struct lp_channels;

struct lp_channel_options {
	uint32_t header_size; /* LP_HEADER_NEW; LP_HEADER_OLD for CRIU up to 4.1.1 (docs/architecture.md) */
	uint32_t max_pages;   /* of a request that the serving thread makes */
	uint64_t floor;	      /* bytes: least background window, if faults have another channel to the server; else 0 */
	bool zeros;	      /* the answer for pages of zeros may have no bytes (wire.Features.ZERO) */
	bool background;      /* for background pages, too; false: for faults only */
	bool compress;	      /* background requests allow compressed answers: the peer is a relay */
};

/* Requested pages of a task, by its tag and their address at dump time. */
struct lp_request {
	uint64_t tag, dump_addr, nr_pages;
	uint64_t since; /* when a thread began to wait for them, CLOCK_MONOTONIC ns; 0: no thread waits */
	uint64_t sent;	/* time of the request, ns */
	uint64_t delivered; /* lp_pace.delivered at that time */
	bool urgent, reported; /* reported: LP_CHANNEL_ARRIVED is sent for its pages */
};

enum lp_channel_event_kind {
	LP_CHANNEL_ARRIVED = 1, /* pages of a reported request have come, and are placed or deferred */
	LP_CHANNEL_REFUSED,     /* the server lacks the first of these pages */
	LP_CHANNEL_HEARD,	     /* bytes have come on a paused channel */
	LP_CHANNEL_QUIET,	     /* a paused channel has no outstanding requests */
	LP_CHANNEL_BUDGET_SPENT,   /* the budget is used up or withdrawn; nr_pages were requested with it */
	LP_CHANNEL_CLOSED,	     /* the server's answer to lp_channel_finish: status */
	LP_CHANNEL_ENDED,	     /* the last event; status: errno, 0 at the end of the stream, EPROTO for an answer that does
				not match, ESTALE when another destination has completed (wire.Command.COMPLETED) */
};

struct lp_channel_event {
	uint32_t kind;
	int32_t status;
	bool at_boundary; /* LP_CHANNEL_ENDED: the stream ended between two answers */
	bool reported;	  /* LP_CHANNEL_REFUSED: as lp_request.reported */
	uint64_t tag, dump_addr, nr_pages, since;
};

struct lp_channel_state {
	uint64_t outstanding; /* requests */
	uint64_t urgent, background; /* bytes in flight */
	uint64_t limit;	      /* bytes of background that may be in flight */
	uint64_t heard;	      /* ns: time of the last byte, or of the oldest outstanding request if that is later */
	uint64_t oldest;      /* ns: the earliest `since` of the outstanding requests; 0: none */
	uint64_t requests, pages, bytes; /* since the start */
	uint64_t round_trip;  /* ns, smoothed; 0: not known */
};

/*
 * Adds a channel to `channels` (lp_engine_channels).  It duplicates fd, a connected stream socket, which the caller must not use
 * for I/O any more.  Returns NULL and sets errno on failure.
 */
struct lp_channel *lp_channel_new(struct lp_channels *channels, int fd, const struct lp_channel_options *options);
/* Closes the connection and drops the outstanding requests.  The pointer is invalid afterwards; the serving thread frees it. */
void lp_channel_close(struct lp_channel *channel);
/* Readable when there are events. */
int lp_channel_event_fd(const struct lp_channel *channel);
/* Takes up to max events, oldest first; returns their number. */
size_t lp_channel_events(struct lp_channel *channel, struct lp_channel_event *events, size_t max);
/* Requests pages for the owner, with lp_request.reported. */
void lp_channel_ask(struct lp_channel *channel, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, bool urgent);
/* Pauses or resumes the channel: on a paused one only lp_channel_ask makes requests.  Pausing withdraws the budget. */
void lp_channel_pause(struct lp_channel *channel, bool paused);
/*
 * Lets the channel request up to max_bytes of background pages of the task.  LP_CHANNEL_BUDGET_SPENT reports the end: of the budget
 * or of the pages.  A channel has one budget at a time.
 */
void lp_channel_set_budget(struct lp_channel *channel, struct lp_task *task, uint64_t max_bytes);
/*
 * Sends CLOSE (force: FORCE_CLOSE) to the server; flags: wire.CloseFlags.  From then on nothing is requested, and the pages that a
 * short answer lacks are dropped.
 */
void lp_channel_finish(struct lp_channel *channel, bool force, uint32_t flags);
/*
 * Copies the outstanding requests, oldest first.  Returns their number; if that is above max, call again with a larger array, else
 * all are `reported` from now on.
 */
size_t lp_channel_outstanding(struct lp_channel *channel, struct lp_request *requests, size_t max);
void lp_channel_state(struct lp_channel *channel, struct lp_channel_state *state);

#endif
