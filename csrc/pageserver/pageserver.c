/*
 * See pageserver.h. Protocol: lazypages/net/wire.py and docs/criu.md ("Page server protocol").
 */
#include "pageserver.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/page_protocol.h"
#include "common/pages_file.h"

#define PAGE_SIZE UINT64_C(4096)

#define PIECES 256 /* limit of one answer */

/*
 * Waking an idle CPU takes tens of microseconds, as long as a whole round trip
 * of a fault over loopback. So after an answer the thread polls for the next request
 * before it sleeps. The time adapts to the client, as in KVM's
 * halt polling, and polling ends when another thread wants the CPU.
 */
#define POLL_MIN_NS UINT64_C(10000)
#define POLL_MAX_NS UINT64_C(80000)
#define YIELD_NS UINT64_C(20000) /* a longer sched_yield() has let another thread run */

static const struct lp_task_pages *find_task(const struct lp_served *served, uint64_t pid)
{
	uint64_t low = 0, high = served->nr_tasks;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (served->tasks[middle].pid < pid)
			low = middle + 1;
		else
			high = middle;
	}
	return low < served->nr_tasks && served->tasks[low].pid == pid ? &served->tasks[low] : NULL;
}

/* Index of the first extent that ends after `vaddr`. */
static uint64_t find_extent(const struct lp_task_pages *task, uint64_t vaddr)
{
	uint64_t low = 0, high = task->nr_extents;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		const struct lp_extent *extent = &task->extents[middle];

		if (lp_extent_end(extent) <= vaddr)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

size_t lp_find_pages(const struct lp_served *served, uint64_t pid, uint64_t vaddr, uint64_t nr_pages,
		     struct lp_piece *pieces, size_t max)
{
	const struct lp_task_pages *task = find_task(served, pid);
	size_t found = 0;

	if (!task || vaddr % PAGE_SIZE)
		return 0;
	for (uint64_t i = find_extent(task, vaddr); nr_pages && i < task->nr_extents; i++) {
		const struct lp_extent *extent = &task->extents[i];
		struct lp_pages_file *file;
		struct lp_piece *last = found ? &pieces[found - 1] : NULL;
		uint64_t skip, taken, offset;

		if (vaddr < extent->start || extent->source >= task->nr_levels)
			break;
		file = task->levels[extent->source];
		skip = (vaddr - extent->start) / PAGE_SIZE;
		taken = extent->nr_pages - skip < nr_pages ? extent->nr_pages - skip : nr_pages;
		offset = extent->offset + skip * PAGE_SIZE;
		if (!file || offset > file->size || taken * PAGE_SIZE > file->size - offset)
			break;
		if (last && last->file == file && last->offset + last->size == offset) {
			last->size += taken * PAGE_SIZE;
		} else {
			if (found == max)
				break;
			pieces[found++] = (struct lp_piece){file, offset, taken * PAGE_SIZE};
		}
		vaddr += taken * PAGE_SIZE;
		nr_pages -= taken;
	}
	return found;
}

/* Parses the message at `at`; false unless it is a valid GET, without flags. */
static bool parse(const struct lp_client *client, const uint8_t *at, struct lp_header *request)
{
	*request = lp_header_read(client->header_size, at);
	return request->command == LP_COMMAND_GET && !request->flags && request->nr_pages && request->vaddr % PAGE_SIZE == 0 &&
	       request->nr_pages - 1 <= (UINT64_MAX - request->vaddr) / PAGE_SIZE;
}

static bool all_zero(const uint8_t *data, size_t size)
{
	return !data[0] && !memcmp(data, data + 1, size - 1);
}

/* A position in pieces of files that are read one after the other. */
struct reading {
	const struct lp_piece *piece;
	uint64_t done; /* bytes of this piece */
	uint64_t left; /* bytes of all pieces */
	bool unreadable; /* the next page can't be read */
};

/* Reads on, until the buffer is full or a page can't be read. Returns the bytes read. */
static uint64_t read_on(struct reading *at, uint8_t *buffer)
{
	uint64_t size = 0;

	while (at->left && size < LP_BUFFER_SIZE && !at->unreadable) {
		const struct lp_piece *piece = at->piece;
		uint64_t part = piece->size - at->done;
		int64_t got;

		if (part > LP_BUFFER_SIZE - size)
			part = LP_BUFFER_SIZE - size;
		got = lp_pages_read(piece->file->fd, buffer + size, piece->offset + at->done, part / PAGE_SIZE);
		if (got < (int64_t)(part / PAGE_SIZE)) {
			__atomic_store_n(&piece->file->damaged, 1, __ATOMIC_RELAXED);
			at->unreadable = true;
			part = got < 0 ? 0 : (uint64_t)got * PAGE_SIZE;
		}
		size += part;
		at->done += part;
		at->left -= part;
		if (at->done == piece->size) {
			at->piece++;
			at->done = 0;
		}
	}
	return size;
}

/* Sends everything, without a time limit. more: further data follows. 0 or -errno. */
static int send_all(int fd, struct iovec *iov, size_t count, bool more)
{
	while (count) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
		ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | (more ? MSG_MORE : 0));

		if (sent < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		while (count && (size_t)sent >= iov->iov_len) {
			sent -= (ssize_t)iov->iov_len;
			iov++;
			count--;
		}
		if (sent) {
			iov->iov_base = (uint8_t *)iov->iov_base + sent;
			iov->iov_len -= (size_t)sent;
		}
	}
	return 0;
}

/* Answers one GET. 1: answered; 0: the first page is not here or can't be read; -errno. */
static int answer(struct lp_client *client, const struct lp_served *served, const struct lp_header *request)
{
	uint64_t wanted = request->nr_pages < client->max_pages ? request->nr_pages : client->max_pages, bytes = 0;
	struct lp_piece pieces[PIECES];
	uint8_t header[LP_HEADER_NEW], *buffer = client->buffer;
	struct iovec iov[2] = {{header, client->header_size}, {buffer, 0}};
	struct reading at;
	bool zero, damaged = false;
	size_t count;
	uint64_t size;
	int error;

	count = lp_find_pages(served, request->dst_id, request->vaddr, wanted, pieces, PIECES);
	if (!count)
		return 0;
	for (size_t i = 0; i < count; i++) {
		bytes += pieces[i].size;
		damaged |= __atomic_load_n(&pieces[i].file->damaged, __ATOMIC_RELAXED);
	}
	at = (struct reading){.piece = pieces, .left = bytes};
	size = read_on(&at, buffer);
	if (!size)
		return 0;
	zero = client->features & LP_FEATURE_ZERO && all_zero(buffer, size);
	while (zero && at.left && !at.unreadable) {
		uint64_t more = read_on(&at, buffer);

		if (!more || all_zero(buffer, more))
			continue;
		zero = false; /* not all zero: send the pages after all, from the first one on */
		at = (struct reading){.piece = pieces, .left = bytes};
		size = read_on(&at, buffer);
		if (!size)
			return 0;
	}
	if (zero || damaged || at.unreadable) { /* announce only pages that have been read */
		bytes = zero ? bytes - at.left : size;
		at.left = 0;
	}
	lp_header_write(client->header_size, header,
			(struct lp_header){
				.command = LP_COMMAND_ADD_F,
				.flags = zero ? LP_PAGES_ZERO : LP_PAGES_PRESENT,
				.nr_pages = bytes / PAGE_SIZE,
				.vaddr = request->vaddr,
				.dst_id = request->dst_id,
			});
	iov[1].iov_len = size;
	error = send_all(client->fd, iov, zero ? 1 : 2, at.left);
	while (!error && at.left) {
		size = read_on(&at, buffer);
		if (at.unreadable)
			return -EFAULT;
		iov[1] = (struct iovec){buffer, size};
		error = send_all(client->fd, &iov[1], 1, at.left);
	}
	if (error)
		return error;
	client->pages += bytes / PAGE_SIZE;
	return 1;
}

/* Polls for a request for up to poll_ns. -1 with EAGAIN if none has come. */
static ssize_t poll_socket(struct lp_client *client)
{
	uint8_t *room = client->requests + client->end;
	uint64_t began = lp_now_ns(), now = began;

	for (;;) {
		ssize_t got = recv(client->fd, room, LP_REQUESTS_SIZE - client->end, MSG_DONTWAIT);
		uint64_t before;

		if (got >= 0 || errno != EAGAIN || now - began >= client->poll_ns)
			return got;
		before = lp_now_ns();
		sched_yield();
		now = lp_now_ns();
		if (now - before > YIELD_NS) {
			client->poll_ns = 0; /* another thread needs this CPU */
			return recv(client->fd, room, LP_REQUESTS_SIZE - client->end, MSG_DONTWAIT);
		}
	}
}

/* Waits until there is something to receive, or until `deadline`. 0 or -errno. */
static int wait_readable(int fd, uint64_t deadline)
{
	for (;;) {
		struct pollfd one = {.fd = fd, .events = POLLIN};
		uint64_t now = lp_now_ns();
		int ready = poll(&one, 1, now < deadline ? (int)((deadline - now) / 1000000 + 1) : 0);

		if (ready > 0)
			return 0;
		if (!ready)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

/* Waits for more requests; there is room. deadline: 0 for none. Bytes received, 0 at the end, -errno. */
static ssize_t receive(struct lp_client *client, uint64_t deadline)
{
	ssize_t got = poll_socket(client);

	if (got < 0 && errno == EAGAIN && deadline) {
		do {
			int error = wait_readable(client->fd, deadline);

			if (error)
				return error;
			got = recv(client->fd, client->requests + client->end, LP_REQUESTS_SIZE - client->end,
				   MSG_DONTWAIT);
		} while (got < 0 && errno == EAGAIN);
		return got < 0 ? -errno : got;
	}
	if (got < 0 && errno == EAGAIN) {
		uint64_t began = lp_now_ns(), slept;

		do
			got = recv(client->fd, client->requests + client->end, LP_REQUESTS_SIZE - client->end, 0);
		while (got < 0 && errno == EINTR);
		slept = lp_now_ns() - began;
		if (slept > POLL_MAX_NS)
			client->poll_ns /= 2;
		else if (client->poll_ns < POLL_MAX_NS)
			client->poll_ns = client->poll_ns ? client->poll_ns * 2 : POLL_MIN_NS;
		if (client->poll_ns > POLL_MAX_NS)
			client->poll_ns = POLL_MAX_NS;
	}
	return got < 0 ? -errno : got;
}

int lp_answer_gets(struct lp_client *client, const struct lp_served *served)
{
	uint64_t deadline = 0; /* of a request that has arrived in part */

	for (;;) {
		ssize_t got;

		while (client->end - client->start >= client->header_size) {
			struct lp_header request;
			int done = 0;

			if (parse(client, client->requests + client->start, &request))
				done = answer(client, served, &request);
			if (done < 0)
				return done;
			if (!done)
				return LP_CLIENT_OTHER;
			client->start += client->header_size;
		}
		if (client->start == client->end)
			deadline = 0;
		else if (client->start || !deadline)
			deadline = lp_now_ns() + client->patience_ns;
		memmove(client->requests, client->requests + client->start, client->end - client->start);
		client->end -= client->start;
		client->start = 0;
		got = receive(client, deadline);
		if (got < 0)
			return (int)got;
		if (!got)
			return LP_CLIENT_EOF;
		client->end += (uint32_t)got;
	}
}
