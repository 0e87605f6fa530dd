/*
 * Channels of csrc/serve/channels.h without tasks: who asks for pages gets them through a callback, from a thread of its own.
 */
#define _GNU_SOURCE
#include "sink.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct lp_sink {
	struct lp_channels channels;
	int epfd, wakefd;
	_Atomic bool stopped;
};

struct lp_sink *lp_sink_new(lp_sink_place place, void *arg)
{
	struct lp_sink *s = calloc(1, sizeof(*s));
	struct epoll_event event = {.events = EPOLLIN};
	/* there is no background: nobody has a task to give a turn to */
	const struct lp_channel_tasks tasks = {.arg = arg, .place = place};

	s->epfd = epoll_create1(EPOLL_CLOEXEC);
	s->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	epoll_ctl(s->epfd, EPOLL_CTL_ADD, s->wakefd, &event);
	lp_channels_init(&s->channels, s->epfd, s->wakefd, &tasks);
	return s;
}

struct lp_channels *lp_sink_channels(struct lp_sink *s)
{
	return &s->channels;
}

void lp_sink_run(struct lp_sink *s)
{
	while (!atomic_load(&s->stopped)) {
		struct epoll_event events[8];
		bool again = lp_channels_round(&s->channels);
		int n = epoll_wait(s->epfd, events, 8, again ? 1 : -1);
		uint64_t count;

		for (int i = 0; i < n; i++) {
			if (events[i].data.u64 & 1)
				lp_channel_ready((struct lp_channel *)(uintptr_t)(events[i].data.u64 & ~1ull));
			else
				while (read(s->wakefd, &count, sizeof(count)) > 0)
					;
		}
	}
}

void lp_sink_stop(struct lp_sink *s)
{
	uint64_t one = 1;
	ssize_t rc;

	atomic_store(&s->stopped, true);
	rc = write(s->wakefd, &one, sizeof(one));
	(void)rc;
}

void lp_sink_free(struct lp_sink *s)
{
	lp_channels_free(&s->channels);
	close(s->epfd);
	close(s->wakefd);
	free(s);
}
