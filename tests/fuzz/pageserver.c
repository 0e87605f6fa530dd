/*
 * A client of the page server: whatever it sends, it gets the pages that it has asked for, as they are, or nothing.
 *
 * An input is a byte of options, one that says in what pieces the rest comes, and what the client sends.
 */
#define _GNU_SOURCE
#include "pageserver/pageserver.h"

#include <errno.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"

#define BASE ((uint64_t)0x10000)
#define PID 7
#define FILE_PAGES 16
#define ZERO_PAGE 3 /* of each file */

static struct input in;
static unsigned pieces;
static struct lp_client client;
static const uint8_t *requests; /* those that are to be answered */
static struct {
	uint8_t header[32];
	size_t have;
	uint64_t missing, vaddr, done;
} reply;

static const struct lp_extent extents[] = {
	{BASE, 4, 0, 0, 1},
	{BASE + 4 * PAGE, 4, 2 * PAGE, 1, 1},
	{BASE + 8 * PAGE, 2, 0, LP_SOURCE_REMOTE, 1},
	{BASE + 10 * PAGE, 2, 0, 2, 1},
	{BASE + 12 * PAGE, 4, 14 * PAGE, 1, 1}, /* past the end of the file */
	{BASE + 32 * PAGE, 1, 6 * PAGE, 0, 0},
	{~UINT64_C(0) - 2 * PAGE + 1, 1, 5 * PAGE, 0, 1},
};
#define NR_EXTENTS (sizeof(extents) / sizeof(*extents))

static uint64_t word_of(uint32_t file, uint64_t offset)
{
	return offset == ZERO_PAGE * PAGE ? 0 : (uint64_t)(file + 1) << 32 | (offset / PAGE + 1);
}

/* What the page holds: -1 if it is not here. */
static int64_t expected(uint64_t vaddr)
{
	for (size_t i = 0; i < NR_EXTENTS; i++) {
		uint64_t offset = extents[i].offset + (vaddr - extents[i].start);

		if (vaddr < extents[i].start || (vaddr - extents[i].start) / PAGE >= extents[i].nr_pages)
			continue;
		return extents[i].source < 2 && offset < FILE_PAGES * PAGE ? (int64_t)word_of(extents[i].source, offset) : -1;
	}
	return -1;
}

static uint64_t get(const uint8_t *at, size_t size)
{
	uint64_t value = 0;

	memcpy(&value, at, size);
	return value;
}

/* Instead of those of the system: the Makefile is .ci/fuzz. */
ssize_t fuzz_recv(int fd, void *room, size_t size, int flags)
{
	size_t some = pieces ? pieces : size;

	(void)fd, (void)flags;
	if (some > size)
		some = size;
	if (some > in.left)
		some = in.left;
	memcpy(room, in.at, some);
	in.at += some;
	in.left -= some;
	return (ssize_t)some;
}

static void begin_reply(void)
{
	uint64_t word = get(reply.header, 4), nr, asked;
	size_t end = client.header_size;

	nr = end == 24 ? get(reply.header + 4, 4) : get(reply.header + 8, 8);
	asked = end == 24 ? get(requests + 4, 4) : get(requests + 8, 8);
	CHECK(get(requests, 4) == 7);
	CHECK(get(reply.header + end - 16, 8) == get(requests + end - 16, 8));
	CHECK(get(reply.header + end - 8, 8) == get(requests + end - 8, 8) && get(requests + end - 8, 8) == PID);
	CHECK(nr && nr <= asked && nr <= client.max_pages);
	CHECK(word == (6 | 4u << 16) || (word == (6 | 0x100u << 16) && client.features & LP_FEATURE_ZERO));
	reply.vaddr = get(requests + end - 16, 8);
	for (uint64_t i = 0; i < nr; i++)
		CHECK(word == (6 | 4u << 16) ? expected(reply.vaddr + i * PAGE) >= 0 : expected(reply.vaddr + i * PAGE) == 0);
	reply.missing = word == (6 | 4u << 16) ? nr * PAGE : 0;
	reply.done = 0;
	requests += end;
}

ssize_t fuzz_sendmsg(int fd, const struct msghdr *message, int flags)
{
	ssize_t sent = 0;

	(void)fd, (void)flags;
	for (size_t i = 0; i < message->msg_iovlen; i++) {
		const uint8_t *at = message->msg_iov[i].iov_base;
		size_t left = message->msg_iov[i].iov_len;

		sent += (ssize_t)left;
		while (left) {
			if (!reply.missing) {
				size_t some = client.header_size - reply.have;

				some = some < left ? some : left;
				memcpy(reply.header + reply.have, at, some);
				reply.have += some;
				at += some;
				left -= some;
				if (reply.have == client.header_size) {
					reply.have = 0;
					begin_reply();
				}
				continue;
			}
			CHECK(left >= PAGE && left % PAGE == 0);
			for (size_t w = 0; w < PAGE; w += 8)
				CHECK((int64_t)get(at + w, 8) == expected(reply.vaddr + reply.done));
			reply.done += PAGE;
			reply.missing -= PAGE;
			at += PAGE;
			left -= PAGE;
		}
	}
	return sent;
}

static struct lp_pages_file files[2];

static void make_files(void)
{
	for (uint32_t f = 0; f < 2; f++) {
		files[f] = (struct lp_pages_file){.size = FILE_PAGES * PAGE, .fd = memfd_create("pages", 0), .number = f};
		for (uint64_t at = 0; at < FILE_PAGES * PAGE; at += 8) {
			uint64_t word = word_of(f, at / PAGE * PAGE);

			CHECK(pwrite(files[f].fd, &word, 8, (off_t)at) == 8);
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct lp_pages_file *const levels[] = {&files[0], &files[1], NULL};
	const struct lp_task_pages tasks[] = {{PID, extents, NR_EXTENTS, levels, 3}, {PID + 1, NULL, 0, NULL, 0}};
	const struct lp_served served = {tasks, 2};
	uint8_t options;
	int rc;

	if (!files[0].size)
		make_files();
	in = (struct input){data, size};
	options = take(&in);
	pieces = take(&in);
	memset(&client, 0, offsetof(struct lp_client, requests));
	memset(&reply, 0, sizeof(reply));
	client.header_size = options & 1 ? 24 : 32;
	client.features = options & 2 ? LP_FEATURE_ZERO : 0;
	client.max_pages = options & 4 ? 1024 : 2;
	client.patience_ns = ~UINT64_C(0) / 2;
	requests = in.at;
	rc = lp_answer_gets(&client, &served);
	CHECK(rc == LP_CLIENT_EOF || rc == LP_CLIENT_OTHER);
	CHECK(!reply.have && !reply.missing);
	/* what it has not answered is there for the caller, as it came */
	CHECK(client.start <= client.end && client.end <= LP_REQUESTS_SIZE);
	CHECK(requests + (client.end - client.start) == in.at);
	CHECK(!memcmp(client.requests + client.start, requests, client.end - client.start));
	CHECK(client.end - client.start < client.header_size || rc == LP_CLIENT_OTHER);
	return 0;
}
