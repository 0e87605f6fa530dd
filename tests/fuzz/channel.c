/*
 * A page server behind a channel: whatever it sends, only pages that were asked for are placed, each once, where they were
 * asked for and as they came; and what does not fit ends the channel.
 *
 * An input is a byte of options, then steps, each a byte and what it needs.
 */
#define _GNU_SOURCE
#include "serve/channels.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"

#define TAGS 2
#define PAGES 32
#define BASE ((uint64_t)0x100000)
#define ROUNDS 3 /* of the serving thread after each step */

enum step {
	FAULT,	  /* page, pages: a thread wants them */
	ASK,	  /* page, pages: the owner does */
	BYTES,	  /* length: the server sends these */
	ANSWER,	  /* pages: the server answers the oldest request, with a flag that may not fit */
	BUSY,	  /* the first task can take no pages, or can again */
	TURN,	  /* background */
	HOLD,
	TAKE,	  /* the owner asks what is outstanding, and for its events */
	FINISH,
	HANG_UP,
	NR_STEPS,
};


static struct lp_channels channels;
static struct lp_channel *channel;
static struct lp_channel_options options;
static unsigned char wanted[TAGS][PAGES]; /* pages on their way */
static bool busy, raw;	/* raw: the server has sent what we don't know */
static uint64_t background; /* the next page that a turn asks for */
static int server;
static uint8_t asked[1 << 16]; /* what the server has received and not answered */
static size_t nr_asked;

static int64_t claim(void *arg, struct lp_task *task, uint64_t max_pages, uint64_t *tag, uint64_t *dump_addr)
{
	uint64_t nr = 0;

	(void)arg, (void)task;
	*tag = 1;
	while (background < PAGES && wanted[1][background])
		background++;
	*dump_addr = BASE + background * PAGE;
	for (; nr < max_pages && background < PAGES && !wanted[1][background]; nr++)
		wanted[1][background++] = 1;
	return (int64_t)nr;
}

static void give_back(void *arg, struct lp_task *task, uint64_t dump_addr, uint64_t nr_pages)
{
	(void)arg, (void)task;
	for (uint64_t i = 0; i < nr_pages; i++)
		wanted[1][(dump_addr - BASE) / PAGE + i]--;
}

static int place(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes)
{
	const uint64_t *words = bytes;

	(void)arg;
	CHECK(tag < TAGS && dump_addr >= BASE && dump_addr % PAGE == 0 && nr_pages);
	if (busy && !tag)
		return -EAGAIN;
	for (uint64_t i = 0; i < nr_pages; i++) {
		uint64_t page = (dump_addr - BASE) / PAGE + i, word = words[i * PAGE / 8];

		CHECK(page < PAGES && wanted[tag][page]);
		wanted[tag][page]--;
		CHECK(raw || !word || word == (tag << 32 | (page + 1)));
		for (uint64_t w = 1; w < PAGE / 8; w++)
			CHECK(raw || words[i * PAGE / 8 + w] == word);
	}
	return 0;
}

static void look(void)
{
	struct epoll_event events[4];
	uint64_t count;
	int n;

	for (int round = 0; round < ROUNDS; round++) {
		lp_channels_round(&channels);
		n = epoll_wait(channels.epfd, events, 4, 0);
		for (int i = 0; i < n; i++) {
			if (events[i].data.u64 & 1)
				lp_channel_ready((struct lp_channel *)(uintptr_t)(events[i].data.u64 & ~1ull));
			else
				CHECK(read(channels.wakefd, &count, sizeof(count)) == sizeof(count));
		}
	}
}

static void send_all(const void *bytes, size_t size)
{
	const uint8_t *at = bytes;

	for (int tries = 0; size && tries < 1000; tries++) {
		ssize_t n = send(server, at, size, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n > 0) {
			at += n;
			size -= (size_t)n;
		} else if (n < 0 && errno != EAGAIN) {
			return;
		} else {
			look();
		}
	}
	raw |= size > 0; /* an answer that breaks off */
}

static void answer(struct input *in)
{
	static const uint32_t words[] = {6 | 4u << 16, 6 | 0x100u << 16, 6, 1, 6 | 4u << 16, 7, 0x4C02, 6 | 0x200u << 16};
	static uint64_t pages[PAGES][PAGE / 8];
	uint8_t how = take(in), nr = take(in) % (PAGES + 1), bytes[32] = {0};
	uint32_t word = words[how & 7];
	size_t size = options.header_size;
	uint64_t dump_addr, tag, nr_pages = 0;
	ssize_t got;

	while (nr_asked < sizeof(asked) && (got = recv(server, asked + nr_asked, sizeof(asked) - nr_asked, MSG_DONTWAIT)) > 0)
		nr_asked += (size_t)got;
	if (nr_asked < size)
		return;
	memcpy(&nr_pages, asked + (size == 24 ? 4 : 8), size == 24 ? 4 : 8);
	memcpy(&dump_addr, asked + size - 16, 8);
	memcpy(&tag, asked + size - 8, 8);
	nr_asked -= size;
	memmove(asked, asked + size, nr_asked);
	if (how & 8 && nr_pages < nr) /* more than was asked for */
		nr_pages = nr;
	else if (nr < nr_pages)
		nr_pages = nr;
	memcpy(bytes, &word, 4);
	memcpy(bytes + (size == 24 ? 4 : 8), &nr_pages, size == 24 ? 4 : 8);
	memcpy(bytes + size - 16, &dump_addr, 8);
	memcpy(bytes + size - 8, &tag, 8);
	send_all(bytes, size);
	if (word != words[0])
		return;
	for (uint64_t i = 0; i < nr_pages && i < PAGES; i++)
		for (size_t w = 0; w < PAGE / 8; w++)
			pages[i][w] = tag << 32 | ((dump_addr - BASE) / PAGE + i + 1);
	send_all(pages, nr_pages * PAGE);
}

/* What the owner hears, and what it does then: what does not come is nobody's. */
static void hear(void)
{
	struct lp_channel_event events[8];
	struct lp_channel_state state;
	size_t n;

	while ((n = lp_channel_events(channel, events, 8)))
		for (size_t i = 0; i < n; i++) {
			CHECK(events[i].kind >= LP_CHANNEL_ARRIVED && events[i].kind <= LP_CHANNEL_ENDED);
			if (events[i].kind != LP_CHANNEL_REFUSED)
				continue;
			CHECK(events[i].tag < TAGS && events[i].dump_addr >= BASE && events[i].nr_pages <= PAGES);
			for (uint64_t k = 0; k < events[i].nr_pages; k++) {
				CHECK(wanted[events[i].tag][(events[i].dump_addr - BASE) / PAGE + k]);
				wanted[events[i].tag][(events[i].dump_addr - BASE) / PAGE + k]--;
			}
		}
	lp_channel_state(channel, &state);
	CHECK(state.urgent <= TAGS * 256 * PAGES * PAGE && state.background <= TAGS * 256 * PAGES * PAGE);
	CHECK(state.outstanding || (!state.urgent && !state.background));
}

static void want(struct input *in, bool fault)
{
	uint8_t byte = take(in), nr = 1 + take(in) % 8;
	uint64_t tag = byte & 1, page = byte >> 1 & (PAGES - 1);

	if (page + nr > PAGES)
		nr = (uint8_t)(PAGES - page);
	for (uint64_t i = 0; i < nr; i++) /* as the engine does: what is claimed is not asked for again */
		if (wanted[tag][page + i])
			return;
	if (fault && !lp_channels_fault(&channels, tag, BASE + page * PAGE, nr, 1))
		return; /* (those that were asked for before it ended come never) */
	if (!fault)
		lp_channel_ask(channel, tag, BASE + page * PAGE, nr, byte & 0x40);
	memset(&wanted[tag][page], 1, nr);
}

static void begin(uint8_t how)
{
	const struct lp_channel_tasks tasks = {.place = place, .claim = claim, .give_back = give_back};
	struct epoll_event event = {.events = EPOLLIN};
	int ends[2];

	options = (struct lp_channel_options){
		.header_size = how & 1 ? 24 : 32, .max_pages = how & 2 ? 3 : PAGES, .zeros = how & 4, .background = how & 8};
	memset(wanted, 0, sizeof(wanted));
	busy = raw = false;
	background = nr_asked = 0;
	lp_channels_init(&channels, epoll_create1(0), eventfd(0, EFD_NONBLOCK), &tasks);
	CHECK(!epoll_ctl(channels.epfd, EPOLL_CTL_ADD, channels.wakefd, &event));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	CHECK((channel = lp_channel_new(&channels, ends[0], &options)));
	close(ends[0]);
	server = ends[1];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct lp_request requests[TAGS * PAGES * 2];
	struct input in = {data, size};

	begin(take(&in));
	look();
	for (int steps = 0; in.left && steps < 200; steps++) {
		uint8_t byte = take(&in), length;

		switch (byte % NR_STEPS) {
		case FAULT:
		case ASK:
			want(&in, byte % NR_STEPS == FAULT);
			break;
		case BYTES:
			length = take(&in);
			if (length > in.left)
				length = (uint8_t)in.left;
			raw = true;
			send_all(in.at, length);
			in.at += length;
			in.left -= length;
			break;
		case ANSWER:
			answer(&in);
			break;
		case BUSY:
			busy = !busy;
			break;
		case TURN:
			lp_channel_set_budget(channel, (struct lp_task *)&channels, (1 + take(&in)) * PAGE);
			break;
		case HOLD:
			lp_channel_pause(channel, take(&in) & 1);
			break;
		case TAKE:
			hear();
			lp_channel_outstanding(channel, requests, sizeof(requests) / sizeof(*requests));
			break;
		case FINISH:
			lp_channel_finish(channel, byte & 0x80, 0);
			break;
		case HANG_UP:
			shutdown(server, SHUT_RDWR);
			break;
		}
		look();
	}
	hear();
	busy = false;
	look();
	CHECK(!channels.deferred && !channels.deferred_bytes);
	close(server);
	lp_channel_close(channel);
	look();
	CHECK(!channels.channels);
	lp_channels_free(&channels);
	close(channels.epfd);
	close(channels.wakefd);
	return 0;
}
