/* All channels of an engine, as the serving thread uses them (channel.h: as their owner does). */
#ifndef LAZYPAGES_CHANNELS_H
#define LAZYPAGES_CHANNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "channel.h"

/* Operations on tasks, implemented by the engine.  The serving thread calls them without any channel's lock. */
struct lp_channel_tasks {
	void *arg;
	/* Places received pages.  Returns 0, or -EAGAIN: call again later with the same arguments. */
	int (*place)(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes);
	/* Claims up to max_pages background pages of a task.  Returns their number, 0 if none is pending, or -EAGAIN: try later. */
	int64_t (*claim)(void *arg, struct lp_task *task, uint64_t max_pages, uint64_t *tag, uint64_t *dump_addr);
	/* Releases a claim whose pages were not requested. */
	void (*give_back)(void *arg, struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages);
};

struct lp_deferred_pages;

/* All channels of an engine. */
struct lp_channels {
	int epfd, wakefd;
	struct lp_channel_tasks tasks;
	struct lp_channel *_Atomic fresh; /* made by the owner, not yet known to the serving thread */
	struct lp_channel *channels;
	struct lp_deferred_pages *deferred; /* oldest first; they may outlive their channel */
	struct lp_deferred_pages **last_deferred;
	size_t deferred_bytes;
};

void lp_channels_init(struct lp_channels *channels, int epfd, int wakefd, const struct lp_channel_tasks *tasks);
void lp_channels_free(struct lp_channels *channels);
/* Requests the pages of a fault that are not in flight already.  False: no channel can request them. */
bool lp_channels_fault(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, uint64_t since);
/* A thread waits for a page that is claimed already.  Returns whether the page is in flight on a channel or deferred. */
bool lp_channels_escalate(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t since);
/* Withdraws the budgets of a task that is about to be freed. */
void lp_channels_forget(struct lp_channels *channels, const struct lp_task *task);
/* Handles an epoll event of a channel. */
void lp_channel_ready(struct lp_channel *channel);
/* Whether the answer to a fault is outstanding on any channel. */
bool lp_channels_expect(const struct lp_channels *channels);
/* To be called once per iteration of the serving loop: adds new channels, frees closed ones, sends.  True: call again soon. */
bool lp_channels_round(struct lp_channels *channels);

#endif
