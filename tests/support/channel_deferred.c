/*
 * A channel of csrc/serve/channels.h whose first task can't take its pages, and the second can: what comes for the second is placed
 * at once, as long as there is room for what the first can't take; nothing is placed twice, or never, or elsewhere; and
 * nobody waits for the channel by asking over and over again.  Exits 1 and says what is wrong.
 */
#define _GNU_SOURCE
#include "serve/channels.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/page.h"

#define BUSY 1u
#define READY 2u
#define PAGES 4096u /* 16 MiB: more than is put aside */
#define BASE 0x100000ull

struct header {
	uint32_t command, nr_pages;
	uint64_t vaddr, dst_id;
};

static struct lp_channels channels;
static unsigned char placed[3][PAGES];
static int busy = 1, looks;

#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                             \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

static uint64_t id_of(uint64_t tag, uint64_t page)
{
	return tag << 32 | page;
}

static int place(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes)
{
	const uint64_t *words = bytes;

	(void)arg;
	if (tag == BUSY && busy)
		return -EAGAIN;
	for (uint64_t i = 0; i < nr_pages; i++) {
		uint64_t page = ((dump_addr - BASE) >> LP_PAGE_SHIFT) + i;

		CHECK(!placed[tag][page]);
		placed[tag][page] = 1;
		for (int w = 0; w < 512; w++)
			CHECK(words[i * 512 + w] == id_of(tag, page));
	}
	return 0;
}

/* As lp_engine_run. Returns what epoll_wait did. */
static int look(void)
{
	struct epoll_event events[8];
	bool again = lp_channels_round(&channels);
	int n = epoll_wait(channels.epfd, events, 8, again ? 1 : 20);
	uint64_t count;

	looks++;
	for (int i = 0; i < n; i++) {
		if (events[i].data.u64 & 1)
			lp_channel_ready((struct lp_channel *)(uintptr_t)(events[i].data.u64 & ~1ull));
		else
			CHECK(read(channels.wakefd, &count, sizeof(count)) == sizeof(count));
	}
	return n;
}

static void answer(int server, uint64_t tag, uint64_t page)
{
	static struct {
		struct header header;
		uint64_t words[512];
	} __attribute__((packed)) message;
	size_t sent = 0;

	message.header = (struct header){6 | 4u << 16, 1, BASE + (page << LP_PAGE_SHIFT), tag};
	for (int w = 0; w < 512; w++)
		message.words[w] = id_of(tag, page);
	while (sent < sizeof(message)) {
		ssize_t n = send(server, (char *)&message + sent, sizeof(message) - sent, MSG_DONTWAIT);

		if (n > 0)
			sent += (size_t)n;
		else if (look() == 0 && looks > 100000)
			CHECK(!"it takes nothing any more");
	}
}

static void forget_requests(int server)
{
	static char asked[1 << 16];

	look();
	while (recv(server, asked, sizeof(asked), MSG_DONTWAIT) > 0)
		;
}

static unsigned count(uint64_t tag)
{
	unsigned n = 0;

	for (unsigned i = 0; i < PAGES; i++)
		n += placed[tag][i];
	return n;
}

int main(void)
{
	const struct lp_channel_tasks tasks = {.place = place}; /* nothing is claimed: there is no background */
	const struct lp_channel_options options = {.header_size = sizeof(struct header), .max_pages = 1};
	struct epoll_event event = {.events = EPOLLIN};
	int ends[2], size = 32 << 20, epfd = epoll_create1(0), wakefd = eventfd(0, EFD_NONBLOCK);
	struct lp_channel_event events[8];
	struct lp_channel *channel;

	lp_channels_init(&channels, epfd, wakefd, &tasks);
	CHECK(!epoll_ctl(epfd, EPOLL_CTL_ADD, wakefd, &event));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	CHECK(!setsockopt(ends[1], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)));
	CHECK((channel = lp_channel_new(&channels, ends[0], &options)));
	close(ends[0]);
	look();

	/* within bounds: the second task does not wait for the first */
	for (uint64_t page = 0; page < 500; page++) {
		CHECK(lp_channels_fault(&channels, BUSY, BASE + (page << LP_PAGE_SHIFT), 1, 1));
		CHECK(lp_channels_fault(&channels, READY, BASE + (page << LP_PAGE_SHIFT), 1, 1));
	}
	for (uint64_t page = 0; page < 500; page++) {
		answer(ends[1], BUSY, page);
		answer(ends[1], READY, page);
	}
	while (count(READY) < 500)
		CHECK(look() >= 0 && looks < 100000);
	CHECK(count(BUSY) == 0);
	/* these are on their way still, and not asked for again */
	CHECK(lp_channels_escalate(&channels, BUSY, BASE + (499 << LP_PAGE_SHIFT), 1));
	CHECK(!lp_channels_escalate(&channels, BUSY, BASE + (500 << LP_PAGE_SHIFT), 1));
	CHECK(!lp_channels_escalate(&channels, READY, BASE + (499 << LP_PAGE_SHIFT), 1));

	/* beyond them: the channel waits, also when the other side has hung up, and not by being told so all the time */
	for (uint64_t page = 500; page < 3000; page++)
		CHECK(lp_channels_fault(&channels, BUSY, BASE + (page << LP_PAGE_SHIFT), 1, 1));
	CHECK(lp_channels_fault(&channels, READY, BASE + (500 << LP_PAGE_SHIFT), 1, 1));
	for (uint64_t page = 500; page < 3000; page++)
		answer(ends[1], BUSY, page);
	answer(ends[1], READY, 500);
	forget_requests(ends[1]);
	close(ends[1]);
	for (int i = 0; i < 10; i++)
		look();
	for (int i = 0; i < 50; i++)
		CHECK(look() == 0);
	CHECK(count(BUSY) == 0 && count(READY) == 500);
	CHECK(channels.deferred_bytes <= 4 << 20);

	/* the first can take them: all is there, and only then the channel has ended */
	busy = 0;
	while (count(BUSY) < 3000 || count(READY) < 501)
		CHECK(look() >= 0 && looks < 200000);
	while (!lp_channel_events(channel, events, 8))
		CHECK(look() >= 0 && looks < 200000);
	CHECK(events[0].kind == LP_CHANNEL_ENDED && events[0].status == 0 && events[0].at_boundary);
	CHECK(!channels.deferred && !channels.deferred_bytes);

	lp_channel_close(channel);
	look();
	CHECK(!channels.channels);
	lp_channels_free(&channels);
	return 0;
}
