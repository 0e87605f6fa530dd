/*
 * A channel: a connection to a page server on which the serving thread itself asks for the pages of faults, and for pages of the
 * background within a budget.
 *
 * Its owner has connected it, and knows what the server speaks.  The answers come in the order of the requests and are
 * held against them; one that does not fit ends the channel.  What needs a decision goes to the owner as an event: pages
 * that the server has not, silence, the end.  The owner then takes what is outstanding and asks for it elsewhere.
 *
 * Two threads at most: the owner calls what is declared under "owner", the thread of lp_engine_run all else.
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
	uint32_t max_pages;   /* of one request that is not the owner's */
	uint64_t floor;	      /* bytes of background that may be on their way at least: where faults have other channels; or 0 */
	bool zeros;	      /* pages of zeros may be answered without bytes (wire.Features.ZERO) */
	bool background;      /* besides faults */
	bool compress;	      /* requests of the background say that they may be answered compressed: a relay is at the other side */
};

/* Pages of a task, by its tag and their address at dump time. */
struct lp_request {
	uint64_t tag, dump_addr, nr_pages;
	uint64_t since; /* CLOCK_MONOTONIC ns when a thread began to wait for it; 0: none does */
	uint64_t sent;	/* when it was asked for */
	uint64_t delivered; /* bytes that had come by then */
	bool urgent, reported; /* reported: its arrival is */
};

enum lp_channel_event_kind {
	LP_CHANNEL_ARRIVED = 1, /* pages that the owner knows of have come, and are in their place or will be as soon as they can */
	LP_CHANNEL_REFUSED,     /* the server has not the first of these */
	LP_CHANNEL_HEARD,	     /* bytes have come on a paused channel */
	LP_CHANNEL_QUIET,	     /* nothing is outstanding on a paused channel any more */
	LP_CHANNEL_BUDGET_SPENT,   /* of the background: nr_pages were asked for */
	LP_CHANNEL_CLOSED,	     /* the answer to lp_channel_finish: status */
	LP_CHANNEL_ENDED,	     /* nothing comes any more; status: errno, 0 at the end of the stream, EPROTO for garbage,
				ESTALE when another destination has completed (wire.Command.COMPLETED) */
};

struct lp_channel_event {
	uint32_t kind;
	int32_t status;
	bool at_boundary; /* LP_CHANNEL_ENDED: what came is whole answers */
	bool reported;	  /* LP_CHANNEL_REFUSED: the owner knew of it */
	uint64_t tag, dump_addr, nr_pages, since;
};

struct lp_channel_state {
	uint64_t outstanding; /* requests */
	uint64_t urgent, background; /* bytes on their way */
	uint64_t limit;	      /* bytes that the background may have on their way now */
	uint64_t heard;	      /* ns: the last byte, or the first request that is due */
	uint64_t oldest;      /* ns: the first `since` of what is outstanding, 0: none */
	uint64_t requests, pages, bytes;
	uint64_t round_trip;  /* ns, smoothed; 0: not known */
};

/* ---- owner ---- */

/*
 * One of `channels` (lp_engine_channels).  The connected stream socket fd is duplicated, and must not be used for anything else
 * from here on.  NULL with errno.
 */
struct lp_channel *lp_channel_new(struct lp_channels *channels, int fd, const struct lp_channel_options *options);
/* The pointer is no longer valid; what is outstanding is forgotten. */
void lp_channel_close(struct lp_channel *channel);
/* Readable when there are events. */
int lp_channel_event_fd(const struct lp_channel *channel);
size_t lp_channel_events(struct lp_channel *channel, struct lp_channel_event *events, size_t max);
/* Asks for pages that the owner wants, as lp_request.reported. */
void lp_channel_ask(struct lp_channel *channel, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, bool urgent);
/* On a paused channel only lp_channel_ask makes requests. */
void lp_channel_pause(struct lp_channel *channel, bool paused);
/* Asks for the background of this task, until max_bytes have been asked for or nothing is left: LP_CHANNEL_BUDGET_SPENT.  One at a time. */
void lp_channel_set_budget(struct lp_channel *channel, struct lp_task *task, uint64_t max_bytes);
/* Tells the server that this is the end; flags: wire.CloseFlags. */
void lp_channel_finish(struct lp_channel *channel, bool force, uint32_t flags);
/* What has not come yet, the oldest first; the arrival of all of it is reported from then on.  Returns how many there are. */
size_t lp_channel_outstanding(struct lp_channel *channel, struct lp_request *requests, size_t max);
void lp_channel_state(struct lp_channel *channel, struct lp_channel_state *state);

#ifndef LP_CFFI
/* ---- the serving thread ---- */

/* What channels need of the tasks: the engine fills this in.  The serving thread calls it, with no lock of a channel held. */
struct lp_channel_tasks {
	void *arg;
	/* Places pages that have come: 0, or -EAGAIN when that has to be tried again with the same. */
	int (*place)(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes);
	/* Claims up to max_pages of a task for the background: 0 when nothing is left, -EAGAIN when it can't be reported now. */
	int64_t (*claim)(void *arg, struct lp_task *task, uint64_t max_pages, uint64_t *tag, uint64_t *dump_addr);
	/* What was claimed is not asked for after all. */
	void (*give_back)(void *arg, struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages);
};

/* Pages that have come and can't be placed at the moment. */
struct lp_deferred_pages;

/* All channels of an engine. */
struct lp_channels {
	int epfd, wakefd;
	struct lp_channel_tasks tasks;
	struct lp_channel *_Atomic fresh; /* made by the owner, not adopted yet */
	struct lp_channel *channels;
	struct lp_deferred_pages *deferred; /* oldest first; no channel's, since they outlive it */
	struct lp_deferred_pages **last_deferred;
	size_t deferred_bytes;
};

void lp_channels_init(struct lp_channels *channels, int epfd, int wakefd, const struct lp_channel_tasks *tasks);
void lp_channels_free(struct lp_channels *channels);
/* Asks for the pages of a fault, those that are not on their way already.  False: no channel can. */
bool lp_channels_fault(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since);
/* A thread waits for a page that is claimed already: whether a channel is bringing it. */
bool lp_channels_escalate(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t since);
/* The task is about to be freed. */
void lp_channels_forget(struct lp_channels *channels, const struct lp_task *task);
/* What epoll says of a channel. */
void lp_channel_ready(struct lp_channel *channel);
/* Whether a page server may answer a fault any moment. */
bool lp_channels_expect(const struct lp_channels *channels);
/*
 * Once a round: adopts new channels, frees closed ones, sends.  True when something has to be tried again soon.
 */
bool lp_channels_round(struct lp_channels *channels);

#endif
#endif
