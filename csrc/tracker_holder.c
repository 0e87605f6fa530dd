/*
 * tracker_holder: keeps the descriptors of dirty tracking while no dumptool runs, one process for each tracked tree.
 *
 * Usage: tracker_holder RECEIVE SEND STARTER (numbers of open descriptors). It goes into the background, prints its pid,
 * and then has these descriptors:
 *
 *   0-2 and 5-7	/dev/null; 5 is STARTER, or the pipe of a KEEP, until the other end of that pipe is closed
 *   3		RECEIVE: messages come from here
 *   4		SEND: whoever may trace this process takes a duplicate (pidfd_getfd(2)) and sends messages
 *   8 + 3n	the pidfd of a tracked process; then the memfd with its record, and its userfaultfd, if it has one
 *
 * It does not look into any of them. It closes those of a process when that has ended, and ends with the last one,
 * but not before that pipe's other end is closed.
 * dumptool finds it by its name in /proc, and reads the records there (dumptool/holders.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { RECEIVE = 3, SEND = 4, STARTER = 5, FIRST = 8, WIDTH = 3 };
enum { PIDFD, MEMFD, UFFD };		     /* places of descriptors in a slot */
enum { HOLD = 1, ADD_UFFD = 2, DROP = 3, KEEP = 5 }; /* messages; others only carry descriptors, which are closed */
#define MAX_FDS 2

struct message {
	uint32_t what;
	int32_t pid;
};

static int32_t *slots; /* pid of each, 0: free */
static struct pollfd *polled;
static size_t nr_slots, nr_used;
static int starter = 1; /* whether STARTER is a pipe */

static int number(size_t slot, int place)
{
	return FIRST + WIDTH * (int)slot + place;
}

/* Moves a descriptor to its place. */
static int move(int fd, int goal)
{
	if (fd == goal)
		return 0;
	if (dup3(fd, goal, O_CLOEXEC) < 0)
		return -1;
	close(fd);
	return 0;
}

static size_t find(int32_t pid)
{
	size_t slot = 0;

	while (slot < nr_slots && slots[slot] != pid)
		slot++;
	return slot;
}

/* `received`: descriptors that stay; NULL: none. One may have the place of the userfaultfd, if the slot has none. */
static void drop(size_t slot, const int *received)
{
	int uffd = number(slot, UFFD);

	/* The record goes first: nobody may find one without its userfaultfd. */
	close(number(slot, MEMFD));
	if (!received || (received[PIDFD] != uffd && received[MEMFD] != uffd))
		close(uffd);
	close(number(slot, PIDFD));
	slots[slot] = 0;
	nr_used--;
}

/* A free slot; -1 if there is no memory. */
static int grow(void)
{
	size_t more = nr_slots ? 2 * nr_slots : 16;
	int32_t *bigger = realloc(slots, more * sizeof(*slots));
	struct pollfd *wider;

	if (!bigger)
		return -1;
	slots = bigger;
	wider = realloc(polled, (2 + more) * sizeof(*polled));
	if (!wider)
		return -1;
	polled = wider;
	memset(slots + nr_slots, 0, (more - nr_slots) * sizeof(*slots));
	nr_slots = more;
	return 0;
}

/*
 * Descriptors that were received have the lowest free numbers, in ascending order. So one of a lower place may sit on the
 * goal of none, and one of a higher place only on that of a lower one: the last is moved first.
 */
static int hold(int32_t pid, const int fds[MAX_FDS])
{
	size_t slot = find(pid);

	if (slot < nr_slots)
		drop(slot, fds); /* of an earlier process */
	slot = find(0);
	if (slot == nr_slots && grow() < 0)
		return -1;
	if (move(fds[MEMFD], number(slot, MEMFD)) < 0)
		return -1;
	if (move(fds[PIDFD], number(slot, PIDFD)) < 0) {
		close(number(slot, MEMFD));
		return -1;
	}
	slots[slot] = pid;
	nr_used++;
	return 0;
}

/* Does what the next message says. 0: there is none. */
static int receive(void)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} control;
	struct message message;
	struct iovec part = { &message, sizeof(message) };
	struct msghdr envelope = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
	int fds[MAX_FDS], nr_fds = 0, taken = 0;
	struct cmsghdr *header;
	ssize_t size = recvmsg(RECEIVE, &envelope, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	size_t slot;

	if (size < 0)
		return 0;
	if (size != sizeof(message))
		memset(&message, 0, sizeof(message));
	header = CMSG_FIRSTHDR(&envelope);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
		nr_fds = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(header), nr_fds * sizeof(int));
	}
	switch (message.what) {
	case HOLD:
		taken = nr_fds == 2 && hold(message.pid, fds) == 0;
		break;
	case ADD_UFFD:
		slot = find(message.pid);
		taken = nr_fds == 1 && slot < nr_slots && move(fds[0], number(slot, UFFD)) == 0;
		break;
	case KEEP:
		taken = nr_fds == 1 && move(fds[0], STARTER) == 0;
		starter |= taken;
		break;
	case DROP:
		slot = find(message.pid);
		if (message.pid && slot < nr_slots)
			drop(slot, NULL);
		break;
	}
	for (int i = 0; !taken && i < nr_fds; i++)
		close(fds[i]);
	return 1;
}

/* Waits for a message, or for the end of a process. */
static void wait_for_one(void)
{
	for (size_t slot = 0; slot < nr_slots; slot++)
		polled[2 + slot] = (struct pollfd){ slots[slot] ? number(slot, PIDFD) : -1, POLLIN, 0 };
	polled[0] = (struct pollfd){ RECEIVE, POLLIN, 0 };
	if (poll(polled, 2 + nr_slots, -1) < 0)
		return;
	for (size_t slot = 0; slot < nr_slots; slot++)
		if (polled[2 + slot].fd >= 0 && polled[2 + slot].revents)
			drop(slot, NULL);
	if (starter && polled[1].revents)
		starter = dup2(0, STARTER) < 0;
	if (polled[0].revents)
		receive();
}

int main(int argc, char **argv)
{
	struct rlimit limit;
	sigset_t all;
	int fds[3];
	pid_t child;

	if (argc != 4)
		return 2;
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) { /* the soft limit is often 1024: room for 338 processes */
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	for (int i = 0; i < 3; i++) {
		fds[i] = fcntl(atoi(argv[1 + i]), F_DUPFD_CLOEXEC, 64); /* out of the way */
		if (fds[i] < 0)
			return 1;
	}
	for (int i = 0; i < 3; i++)
		if (move(fds[i], RECEIVE + i) < 0)
			return 1;
	child = fork();
	if (child) {
		if (child > 0)
			printf("%d\n", child);
		return child < 0;
	}
	setsid();
	if (chdir("/") < 0)
		return 1;
	for (int fd = 1; fd < FIRST; fd++)
		if ((fd < RECEIVE || fd > STARTER) && dup2(0, fd) < 0)
			return 1;
	close_range(FIRST, ~0U, 0);
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	if (grow() < 0)
		return 1;
	while (starter || nr_used || receive()) {
		polled[1] = (struct pollfd){ starter ? STARTER : -1, POLLIN, 0 };
		wait_for_one();
	}
	return 0;
}
