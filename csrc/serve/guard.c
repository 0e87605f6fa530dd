#define _GNU_SOURCE
#include "guard.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/futex.h>

#include "uffd_ops.h"

#define PAGE 4096
#define COMPLETE (-1)
#define NAME "uffd-guard" /* matched by no pattern that is meant for the daemon: killall lazypages, pkill -f "lazypages serve" */
#define LINE 256	  /* bytes of a message */
#define SCM_MAX 253	  /* descriptors in one message: SCM_MAX_FD, unix(7) */
#define LOOK_MS 20
#define LEAVE_LOOKS 50 /* LOOK_MS apart: how long the daemon's end waits for tasks that are ending */
#define LARGE (128u << 10) /* bytes: a mapping of this size is no library's */

/* In memory that daemon and guard share.  It outlives a guard that is killed, and the next one goes on with it. */
struct lp_guard {
	pid_t pid;
	int pidfd;  /* of the guard; the daemon's, and -1 if there is no guard at the moment */
	int daemon; /* pidfd */
	int log_fd;
	void *unreadable; /* a page that can't be read */
	char *command; /* the bytes that /proc/PID/cmdline shows: command_size of them */
	size_t command_size;
	int top; /* the guard's, when it takes over: all descriptors in use are below this */
	_Atomic uint32_t ready; /* the guard has its own name; a futex */
	_Atomic bool left; /* the daemon has ended regularly, but for what it had to leave */
	struct {
		_Atomic int32_t pid; /* 0: nothing is known; COMPLETE */
		_Atomic int32_t pidfd; /* the daemon's; only if there is a pid */
	} about[LP_GUARD_FDS]; /* by uffd */
};

/* Whether the memory behind a uffd exists no more. */
static bool is_gone(const struct lp_guard *g, int uffd)
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

static void say(const struct lp_guard *g, const struct text *t)
{
	ssize_t rc = write(g->log_fd, t->at, t->nr);

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

static bool is_uffd(int fd)
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
	if (poll(&process, 1, 0) || is_gone(g, uffd) || syscall(SYS_pidfd_send_signal, process.fd, SIGKILL, NULL, 0))
		return is_gone(g, uffd);
	add_text(&t, "lazypages: the daemon ");
	add_text(&t, end_of_daemon(g));
	add_text(&t, "; task ");
	add_number(&t, (unsigned int)atomic_load(&g->about[uffd].pid));
	add_text(&t, " misses pages and is killed, too\n");
	say(g, &t);
	return true;
}

static void say_unknown(const struct lp_guard *g, unsigned int unknown)
{
	struct text t = {0};

	add_text(&t, "lazypages: the daemon ");
	add_text(&t, end_of_daemon(g));
	add_text(&t, "; tasks whose pids it did not know wait for pages that will not come: ");
	add_number(&t, unknown);
	add_text(&t, "; end them\n");
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
	if (fd >= LP_GUARD_FDS || !is_uffd(fd)) {
		close(fd);
		return 0;
	}
	atomic_store(&g->about[fd].pid, 0);
	see(g, fd);
	return !is_gone(g, fd);
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

		if (fcntl(fd, F_GETFD) < 0 || socket_domain(fd) != AF_UNIX)
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

/* What the daemon has left and nobody needs: so that there are numbers for what has still to be received. */
static void close_others(const struct lp_guard *g)
{
	for (int fd = 0; fd < g->top; fd++)
		if (fd != g->log_fd && fd != g->daemon && fcntl(fd, F_GETFD) >= 0 && socket_domain(fd) != AF_UNIX &&
		    !is_uffd(fd) && !is_pidfd(fd))
			close(fd);
}

/* Closes the uffds of tasks that are gone.  How many are left. */
static unsigned int close_gone(struct lp_guard *g)
{
	unsigned int left = 0;

	for (int fd = 0; fd < g->top; fd++) {
		if (atomic_load(&g->about[fd].pid) == COMPLETE || !is_uffd(fd))
			continue;
		if (!is_gone(g, fd)) {
			left++;
			continue;
		}
		atomic_store(&g->about[fd].pid, COMPLETE);
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

/* The daemon is gone.  Everything here works on the file descriptors that it has left. */
static void take_over(struct lp_guard *g)
{
	const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000};
	unsigned int unknown = 0, said = 0, left;
	int bound = fd_bound();
	bool all = false;

	for (int fd = 0; fd < bound; fd++) {
		int32_t pid = atomic_load(&g->about[fd].pid);

		if (fcntl(fd, F_GETFD) < 0)
			continue;
		see(g, fd);
		if (pid == COMPLETE || !is_uffd(fd))
			atomic_store(&g->about[fd].pid, COMPLETE); /* nothing to hold */
		else if (pid > 0)
			unknown += !kill_task(g, fd);
		else
			unknown += !is_gone(g, fd);
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
		nanosleep(&pause, NULL);
	}
}

/* To whatever is allowed: a guard that the OOM killer takes together with the daemon is none (proc_pid_oom_score_adj(5)). */
static void avoid_oom(void)
{
	int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
	char now[16] = "";
	ssize_t rc;

	if (fd < 0)
		return;
	rc = read(fd, now, sizeof(now) - 1);
	/* less than what was given to us takes CAP_SYS_RESOURCE; what we were raised to without, anybody may take back */
	if (pwrite(fd, "-1000", 5, 0) < 0 && now[0] != '-' && now[0] != '0')
		rc = pwrite(fd, "0", 1, 0);
	(void)rc;
	close(fd);
}

/* What tells the guard from the daemon for those who look for processes by name or command line (pkill(1), killall(1)). */
static void rename_guard(const struct lp_guard *g)
{
	size_t size = sizeof(NAME) < g->command_size ? sizeof(NAME) : g->command_size;

	prctl(PR_SET_NAME, NAME);
	if (!size)
		return;
	/* the daemon has a copy of its own of these pages */
	memset(g->command, 0, g->command_size);
	memcpy(g->command, NAME, size - 1);
}

/* All signals are blocked: what ends the daemon regularly may come to its whole group or terminal. */
_Noreturn static void guard(struct lp_guard *g)
{
	struct pollfd daemon = {g->daemon, POLLIN, 0};

	rename_guard(g);
	setsid();
	atomic_store(&g->ready, 1);
	syscall(SYS_futex, &g->ready, FUTEX_WAKE, 1, NULL, NULL, 0);
	avoid_oom();
	while (poll(&daemon, 1, -1) < 0)
		;
	take_over(g);
	_exit(0);
}

/*
 * Keeps the daemon's heap out of the second process, or lets it in again: so neither has to copy what the other changes.
 * What that process uses is small: the stack, what its libraries keep, and what the thread pointer points to.
 */
static void inherit_heap(const struct lp_guard *g, int advice)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	uintptr_t start, end, here = (uintptr_t)__builtin_frame_address(0), thread = (uintptr_t)pthread_self();
	uintptr_t command = (uintptr_t)g->command;
	char line[512], rights[8];
	unsigned long inode;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	if (maps) /* what the sanitizer keeps there that process needs, too */
		fclose(maps);
	return;
#endif
	while (maps && fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %7s %*s %*s %lu", &start, &end, rights, &inode) != 4 || inode ||
		    strcmp(rights, "rw-p") || end - start < LARGE || (start <= here && here < end) ||
		    (start <= thread && thread < end) || (start <= command && command < end))
			continue;
		madvise((void *)start, end - start, advice);
	}
	if (maps)
		fclose(maps);
}

/* Where the command line of this process is (proc_pid_stat(5), arg_start and arg_end). */
static void find_command(struct lp_guard *g)
{
	FILE *stat = fopen("/proc/self/stat", "re");
	char line[1024], *at = NULL;
	unsigned long start, end;

	if (stat && fgets(line, sizeof(line), stat))
		at = strrchr(line, ')');
	if (stat)
		fclose(stat);
	for (int field = 2; at && field < 48; field++) /* the name, which may have spaces, is the second */
		at = strchr(at + 1, ' ');
	if (!at || sscanf(at, "%lu %lu", &start, &end) != 2 || !start || end <= start)
		return;
	g->command = (char *)start;
	g->command_size = end - start;
}

static bool has_ended(const struct lp_guard *g)
{
	struct pollfd guard = {g->pidfd, POLLIN, 0};

	return g->pidfd < 0 || poll(&guard, 1, 0) > 0;
}

/* 0 or -errno.  Other threads may run. */
static int begin(struct lp_guard *g)
{
	const struct timespec look = {.tv_nsec = LOOK_MS * 1000000};
	sigset_t all, before;
	int pidfd = -1, error;
	pid_t pid;

	atomic_store(&g->ready, 0);
	/* none of the daemon's signal handlers may run in the second process */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	inherit_heap(g, MADV_DONTFORK);
	/* as fork(2), but for the file descriptors; no signal tells of its end, the pidfd does */
	pid = (pid_t)syscall(SYS_clone, CLONE_FILES | CLONE_PIDFD, NULL, &pidfd, NULL, NULL);
	if (!pid)
		guard(g);
	error = errno;
	inherit_heap(g, MADV_DOFORK);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (pid < 0)
		return -error;
	g->pid = pid;
	g->pidfd = pidfd;
	/* who looks for the daemon by its command line must not find this one, too */
	for (int i = 0; i < LEAVE_LOOKS && !atomic_load(&g->ready) && !has_ended(g); i++)
		syscall(SYS_futex, &g->ready, FUTEX_WAIT, 0, &look, NULL, 0);
	return 0;
}

static void free_guard(struct lp_guard *g)
{
	if (g->daemon >= 0)
		close(g->daemon);
	if (g->unreadable != MAP_FAILED)
		munmap(g->unreadable, PAGE);
	munmap(g, sizeof(*g));
}

struct lp_guard *lp_guard_start(int log_fd)
{
	struct lp_guard *g = mmap(NULL, sizeof(*g), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int rc;

	if (g == MAP_FAILED)
		return NULL;
	g->pidfd = -1;
	g->log_fd = log_fd;
	g->unreadable = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	g->daemon = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (g->unreadable == MAP_FAILED || g->daemon < 0) {
		rc = -errno;
	} else {
		find_command(g);
		rc = begin(g);
	}
	if (!rc)
		return g;
	free_guard(g);
	errno = -rc;
	return NULL;
}

/* Ends what there is of a guard, and forgets it. */
static void reap(struct lp_guard *g)
{
	if (g->pidfd < 0)
		return;
	while (waitpid(g->pid, NULL, __WALL) < 0 && errno == EINTR)
		;
	close(g->pidfd);
	g->pidfd = -1;
}

int lp_guard_restart(struct lp_guard *g)
{
	if (!has_ended(g))
		return 0;
	reap(g);
	return begin(g);
}

/* Whether this process has a uffd open whose task may miss pages. */
static bool has_uffds(const struct lp_guard *g)
{
	DIR *fds = opendir("/proc/self/fd");
	bool any = !fds; /* nobody knows */
	struct dirent *entry;

	while (fds && !any && (entry = readdir(fds))) {
		int fd = atoi(entry->d_name);

		any = fd > 0 && fd < LP_GUARD_FDS && is_uffd(fd) && atomic_load(&g->about[fd].pid) != COMPLETE && !is_gone(g, fd);
	}
	if (fds)
		closedir(fds);
	return any;
}

void lp_guard_end(struct lp_guard *g)
{
	const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000};

	for (int look = 0; has_uffds(g); look++) {
		if (look == LEAVE_LOOKS) {
			lp_guard_restart(g);
			atomic_store(&g->left, true);
			return;
		}
		nanosleep(&pause, NULL);
	}
	if (g->pidfd >= 0)
		syscall(SYS_pidfd_send_signal, g->pidfd, SIGKILL, NULL, 0);
	reap(g);
	free_guard(g);
}

pid_t lp_guard_pid(const struct lp_guard *g)
{
	return g->pid;
}

int lp_guard_pidfd(const struct lp_guard *g)
{
	return g->pidfd;
}

static void know(struct lp_guard *g, int uffd, int32_t pid, int pidfd)
{
	if (!g || uffd < 0 || uffd >= LP_GUARD_FDS)
		return;
	if (pid > 0 && pidfd < 0)
		pid = 0; /* without a pidfd the task can't be killed: the uffd is held */
	/* whenever the guard looks: a pid only while there is its pidfd */
	if (pid <= 0)
		atomic_store(&g->about[uffd].pid, pid);
	atomic_store(&g->about[uffd].pidfd, pid > 0 ? pidfd : -1);
	if (pid > 0)
		atomic_store(&g->about[uffd].pid, pid);
}

void lp_guard_names(struct lp_guard *g, int uffd, pid_t pid, int pidfd)
{
	know(g, uffd, pid, pidfd);
}

void lp_guard_complete(struct lp_guard *g, int uffd)
{
	know(g, uffd, COMPLETE, -1);
}
