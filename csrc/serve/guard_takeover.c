#define _GNU_SOURCE
#include "guard_inner.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "uffd_ops.h"

#define LINE 256	  /* bytes of a message */
#define SCM_MAX 253	  /* descriptors in one message: SCM_MAX_FD, unix(7) */

bool lp_guard_is_gone(const struct lp_guard *g, int uffd)
{
	return lp_uffd_probe(uffd, g->unreadable, LP_ANYWHERE) == LP_TASK_GONE;
}

/*
 * The guard may be begun while other threads run, and one of them may have held any lock of the C library at that moment, for
 * ever.  So from guard() on only async-signal-safe functions are called (signal-safety(7)): no stdio, no malloc.
 */
struct text {
	char at[LINE];
	size_t nr;
};

static void add_text(struct text *t, const char *more)
{
	while (*more && t->nr < sizeof(t->at) - 1)
		t->at[t->nr++] = *more++;
	t->at[t->nr] = 0;
}

static void add_number(struct text *t, unsigned int number)
{
	char digits[12];
	size_t at = sizeof(digits) - 1;

	digits[at] = 0;
	do
		digits[--at] = (char)('0' + number % 10);
	while (number /= 10);
	add_text(t, digits + at);
}

/* A message begins and ends here.  It has no character that JSON would escape. */
static void begin_message(const struct lp_guard *g, struct text *t)
{
	t->nr = 0;
	add_text(t, g->json ? "{\"level\": \"error\", \"message\": \"" : "lazypages: ");
}

static void say(const struct lp_guard *g, struct text *t)
{
	ssize_t rc;

	add_text(t, g->json ? "\"}\n" : "\n");
	rc = write(g->log_fd, t->at, t->nr);
	(void)rc;
}

/* Whether the file behind fd is called so; with a prefix only, what follows it does not matter. */
static bool is_named(int fd, const char *name, bool prefix)
{
	struct text path = {0};
	char found[32];
	ssize_t n;

	add_text(&path, "/proc/self/fd/");
	add_number(&path, (unsigned int)fd);
	n = readlink(path.at, found, sizeof(found) - 1);
	if (n < 0)
		return false;
	found[n] = 0;
	return prefix ? !strncmp(found, name, strlen(name)) : !strcmp(found, name);
}

bool lp_is_uffd(int fd)
{
	return is_named(fd, "anon_inode:[userfaultfd]", false);
}

static bool is_pidfd(int fd)
{
	return is_named(fd, "anon_inode:[pidfd]", false) || is_named(fd, "pidfd:", true); /* since Linux 6.9 */
}

static const char *end_of_daemon(const struct lp_guard *g)
{
	return atomic_load(&g->left) ? "has ended" : "was killed";
}

/* SIGKILL for the process behind a uffd.  False: it has ended before, and others have its memory now. */
static bool kill_task(const struct lp_guard *g, int uffd)
{
	struct pollfd process = {atomic_load(&g->about[uffd].pidfd), POLLIN, 0};
	struct text t = {0};

	/* a zombie takes signals, too */
	if (poll(&process, 1, 0) || lp_guard_is_gone(g, uffd) || syscall(SYS_pidfd_send_signal, process.fd, SIGKILL, NULL, 0))
		return lp_guard_is_gone(g, uffd);
	begin_message(g, &t);
	add_text(&t, "the daemon ");
	add_text(&t, end_of_daemon(g));
	add_text(&t, "; task ");
	add_number(&t, (unsigned int)atomic_load(&g->about[uffd].pid));
	add_text(&t, " misses pages and is killed, too");
	say(g, &t);
	return true;
}

static void say_unknown(const struct lp_guard *g, unsigned int unknown)
{
	struct text t;

	begin_message(g, &t);
	add_text(&t, "the daemon ");
	add_text(&t, end_of_daemon(g));
	add_text(&t, "; tasks whose pids it did not know wait for pages that will not come: ");
	add_number(&t, unknown);
	add_text(&t, "; end them");
	say(g, &t);
}

static int socket_domain(int fd)
{
	int domain;
	socklen_t len = sizeof(domain);

	return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) ? -1 : domain;
}

static void see(struct lp_guard *g, int fd)
{
	if (fd >= g->top)
		g->top = fd + 1;
}

/* A descriptor that has come: uffds are held.  Returns how many tasks that is. */
static unsigned int keep(struct lp_guard *g, int fd)
{
	if (fd >= LP_GUARD_FDS || !lp_is_uffd(fd)) {
		close(fd);
		return 0;
	}
	atomic_store(&g->about[fd].pid, 0);
	see(g, fd);
	return !lp_guard_is_gone(g, fd);
}

/*
 * Takes out what a restorer has sent and the daemon has not read: uffds may be among it.  Each message is looked at before it
 * is taken (MSG_PEEK), which gives us its descriptors once more.  If there is no number for one of them it stays where it is,
 * and that is tried again later; taken, it would be closed (net/core/scm.c, scm_detach_fds; recvmsg(2), MSG_CTRUNC).
 * (The bytes of a message without descriptors may come with those of the one behind it, and these once more with that one:
 * net/unix/af_unix.c, unix_stream_read_generic.  What is held twice is only closed twice.)
 * False: something had to stay.
 */
static bool receive_rest(struct lp_guard *g, int fd, unsigned int *unknown)
{
	char bytes[256], control[CMSG_SPACE(SCM_MAX * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
	struct iovec iov = {bytes, sizeof(bytes)};
	ssize_t size;

	shutdown(fd, SHUT_RD); /* nothing more can come after this */
	for (;;) {
		struct msghdr msg = {
			.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
		bool whole;

		iov.iov_len = sizeof(bytes);
		size = recvmsg(fd, &msg, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (size <= 0)
			return true;
		whole = !(msg.msg_flags & MSG_CTRUNC);
		for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
			if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
				continue;
			for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
				int received;

				memcpy(&received, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
				if (whole)
					*unknown += keep(g, received);
				else
					close(received); /* the message still has it */
			}
		}
		if (!whole)
			return false;
		iov.iov_len = (size_t)size;
		recv(fd, bytes, (size_t)size, MSG_DONTWAIT); /* without room for descriptors: these are let go of */
	}
}

static bool receive_all_rest(struct lp_guard *g, unsigned int *unknown)
{
	bool all = true;

	for (int fd = 0; fd < g->top; fd++) {
		int other;

		if (fd == g->shared || fcntl(fd, F_GETFD) < 0 || socket_domain(fd) != AF_UNIX)
			continue;
		fcntl(fd, F_SETFL, O_NONBLOCK);
		while ((other = accept4(fd, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
			see(g, other); /* if something has to stay, the next try comes to it */
			all &= receive_rest(g, other, unknown);
		}
		all &= errno != EMFILE && errno != ENFILE;
		all &= receive_rest(g, fd, unknown);
	}
	return all;
}

/* Closes what the daemon has left and is not needed, so that there are numbers for descriptors that have still to be received. */
static void close_others(const struct lp_guard *g)
{
	for (int fd = 0; fd < g->top; fd++)
		if (fd != g->log_fd && fd != g->daemon && fcntl(fd, F_GETFD) >= 0 && socket_domain(fd) != AF_UNIX &&
		    !lp_is_uffd(fd) && !is_pidfd(fd))
			close(fd);
}

/* Closes the uffds of tasks that are gone.  How many are left. */
static unsigned int close_gone(struct lp_guard *g)
{
	unsigned int left = 0;

	for (int fd = 0; fd < g->top; fd++) {
		if (atomic_load(&g->about[fd].pid) == LP_GUARD_COMPLETE || !lp_is_uffd(fd))
			continue;
		if (!lp_guard_is_gone(g, fd)) {
			left++;
			continue;
		}
		atomic_store(&g->about[fd].pid, LP_GUARD_COMPLETE);
		close(fd);
	}
	return left;
}

/* All descriptors in use are below this.  The kernel says how large its table is (proc_pid_status(5), FDSize), if we can ask. */
static int fd_bound(void)
{
	char status[4096];
	const char *at;
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC), bound = 0;
	ssize_t size;

	if (fd < 0)
		return LP_GUARD_FDS;
	size = read(fd, status, sizeof(status) - 1);
	close(fd);
	status[size > 0 ? size : 0] = 0;
	at = strstr(status, "\nFDSize:\t");
	for (at = at ? at + 9 : status; *at >= '0' && *at <= '9' && bound < LP_GUARD_FDS; at++)
		bound = bound * 10 + (*at - '0');
	return bound && bound < LP_GUARD_FDS ? bound : LP_GUARD_FDS;
}

void lp_guard_take_over(struct lp_guard *g)
{
	struct timespec pause = {.tv_nsec = LP_GUARD_LOOK_MS * 1000000};
	unsigned int unknown = 0, said = 0, before = 0, left;
	int bound = fd_bound();
	bool all = false;

	for (int fd = 0; fd < bound; fd++) {
		int32_t pid = atomic_load(&g->about[fd].pid);

		if (fcntl(fd, F_GETFD) < 0)
			continue;
		see(g, fd);
		if (pid == LP_GUARD_COMPLETE || !lp_is_uffd(fd))
			atomic_store(&g->about[fd].pid, LP_GUARD_COMPLETE); /* nothing to hold */
		else if (pid > 0)
			unknown += !kill_task(g, fd);
		else
			unknown += !lp_guard_is_gone(g, fd);
	}
	close_others(g);
	for (;;) {
		if (!all)
			all = receive_all_rest(g, &unknown);
		if (unknown > said)
			say_unknown(g, unknown);
		said = unknown;
		left = close_gone(g);
		if (all && !left)
			return;
		/* one that can't be killed may wait for a day */
		if (left != before || !all)
			pause.tv_nsec = LP_GUARD_LOOK_MS * 1000000;
		else if (2 * pause.tv_nsec <= LP_GUARD_LOOK_MOST_MS * 1000000)
			pause.tv_nsec *= 2;
		before = left;
		nanosleep(&pause, NULL);
	}
}
