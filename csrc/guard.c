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
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"

#define MAX_FDS (1u << 20)
#define PAGE 4096
#define COMPLETE (-1)
#define LOOK_MS 20
#define LEAVE_LOOKS 50 /* LOOK_MS apart: how long the daemon's end waits for tasks that are ending */
#define LARGE (128u << 10) /* bytes: a mapping of this size is no library's */

struct lp_guard {
	pid_t pid;
	int daemon; /* pidfd */
	int log_fd;
	int nr_fds;
	void *nowhere; /* a page that can't be read */
	_Atomic bool left; /* the daemon has ended regularly, but for what it had to leave */
	struct {
		_Atomic int32_t pid; /* 0: nothing is known; COMPLETE */
		_Atomic int32_t pidfd; /* 0: none */
	} about[]; /* by uffd */
};

static size_t size_of(int nr_fds)
{
	return sizeof(struct lp_guard) + (size_t)nr_fds * sizeof(((struct lp_guard *)NULL)->about[0]);
}

/* Whether the memory behind a uffd exists no more. */
static bool is_gone(const struct lp_guard *g, int uffd)
{
	return lp_means_gone(lp_probe(uffd, g->nowhere, LP_ANYWHERE));
}

static bool is_uffd(int fd)
{
	char path[32], name[32];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, name, sizeof(name) - 1);
	if (n < 0)
		return false;
	name[n] = 0;
	return !strcmp(name, "anon_inode:[userfaultfd]");
}

__attribute__((format(printf, 2, 3))) static void say(const struct lp_guard *g, const char *format, ...)
{
	char line[256];
	va_list args;
	ssize_t rc;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	rc = write(g->log_fd, line, (size_t)n);
	(void)rc;
}

static const char *end_of_daemon(const struct lp_guard *g)
{
	return atomic_load(&g->left) ? "has ended" : "was killed";
}

/* SIGKILL for the process behind a uffd.  False: it has ended before, and others have its memory now. */
static bool kill_task(const struct lp_guard *g, int uffd)
{
	struct pollfd process = {atomic_load(&g->about[uffd].pidfd), POLLIN, 0};

	/* a zombie takes signals, too */
	if (poll(&process, 1, 0) || is_gone(g, uffd) || syscall(SYS_pidfd_send_signal, process.fd, SIGKILL, NULL, 0))
		return is_gone(g, uffd);
	say(g, "lazypages: the daemon %s; task %d misses pages and is killed, too\n", end_of_daemon(g),
	    (int)atomic_load(&g->about[uffd].pid));
	return true;
}

/* Takes out what a restorer has sent and the daemon has not read: uffds may be among it. */
static void receive_rest(int fd)
{
	char byte[256], control[CMSG_SPACE(64 * sizeof(int))];
	struct iovec iov = {byte, sizeof(byte)};
	struct msghdr msg;

	shutdown(fd, SHUT_RD); /* nothing more can come after this */
	do
		msg = (struct msghdr){
			.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	while (recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) > 0);
}

static void receive_all_rest(const struct lp_guard *g)
{
	int domain;
	socklen_t len = sizeof(domain);

	for (int fd = 0; fd < g->nr_fds; fd++) {
		if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) || domain != AF_UNIX)
			continue;
		fcntl(fd, F_SETFL, O_NONBLOCK);
		for (int other; (other = accept4(fd, NULL, NULL, SOCK_CLOEXEC)) >= 0;)
			receive_rest(other);
		receive_rest(fd);
	}
}

/* The daemon is gone.  Everything here works on the file descriptors that it has left. */
static void take_over(struct lp_guard *g)
{
	const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000};
	int unknown = 0, left;

	receive_all_rest(g);
	for (int fd = 0; fd < g->nr_fds; fd++) {
		int32_t pid = atomic_load(&g->about[fd].pid);

		if (pid == COMPLETE || fcntl(fd, F_GETFD) < 0 || !is_uffd(fd))
			atomic_store(&g->about[fd].pid, COMPLETE); /* nothing to hold */
		else if (pid > 0)
			unknown += !kill_task(g, fd);
		else if (!is_gone(g, fd))
			unknown++;
	}
	if (unknown)
		say(g, "lazypages: the daemon %s; tasks whose pids it did not know wait for pages that will not come: %d; end them\n",
		    end_of_daemon(g), unknown);
	do {
		nanosleep(&pause, NULL);
		left = 0;
		for (int fd = 0; fd < g->nr_fds; fd++)
			left += atomic_load(&g->about[fd].pid) != COMPLETE && !is_gone(g, fd);
	} while (left);
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
	if (pwrite(fd, "-1000", 5, 0) < 0 && atoi(now) > 0)
		rc = pwrite(fd, "0", 1, 0);
	(void)rc;
	close(fd);
}

_Noreturn static void guard(struct lp_guard *g)
{
	struct pollfd daemon = {g->daemon, POLLIN, 0};
	sigset_t all;

	/* what ends the daemon regularly may come to its whole group or terminal */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	setsid();
	prctl(PR_SET_NAME, "lazypages-guard");
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
static void inherit_heap(int advice)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	uintptr_t start, end, here = (uintptr_t)__builtin_frame_address(0), thread = (uintptr_t)pthread_self();
	char line[512], rights[8];
	unsigned long inode;

	while (maps && fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %7s %*s %*s %lu", &start, &end, rights, &inode) != 4 || inode ||
		    strcmp(rights, "rw-p") || end - start < LARGE || (start <= here && here < end) ||
		    (start <= thread && thread < end))
			continue;
		madvise((void *)start, end - start, advice);
	}
	if (maps)
		fclose(maps);
}

struct lp_guard *lp_guard_start(int log_fd)
{
	struct rlimit limit;
	struct lp_guard *g;
	int nr_fds = MAX_FDS, saved;
	pid_t pid;

	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < MAX_FDS)
		nr_fds = (int)limit.rlim_cur;
	g = mmap(NULL, size_of(nr_fds), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (g == MAP_FAILED)
		return NULL;
	g->nr_fds = nr_fds;
	g->log_fd = log_fd;
	g->nowhere = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	g->daemon = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (g->nowhere == MAP_FAILED || g->daemon < 0)
		goto fail;
	/* as fork(2), but for the file descriptors; no signal tells of its end */
	inherit_heap(MADV_DONTFORK);
	pid = (pid_t)syscall(SYS_clone, CLONE_FILES, NULL, NULL, NULL, NULL);
	if (!pid)
		guard(g);
	inherit_heap(MADV_DOFORK);
	g->pid = pid;
	if (pid > 0)
		return g;
fail:
	saved = errno;
	if (g->daemon >= 0)
		close(g->daemon);
	if (g->nowhere != MAP_FAILED)
		munmap(g->nowhere, PAGE);
	munmap(g, size_of(nr_fds));
	errno = saved;
	return NULL;
}

/* Whether this process has a uffd open whose task may miss pages. */
static bool has_uffds(const struct lp_guard *g)
{
	DIR *fds = opendir("/proc/self/fd");
	bool any = !fds; /* nobody knows */
	struct dirent *entry;

	while (fds && !any && (entry = readdir(fds))) {
		int fd = atoi(entry->d_name);

		any = fd > 0 && fd < g->nr_fds && is_uffd(fd) && atomic_load(&g->about[fd].pid) != COMPLETE && !is_gone(g, fd);
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
			atomic_store(&g->left, true);
			return;
		}
		nanosleep(&pause, NULL);
	}
	kill(g->pid, SIGKILL);
	while (waitpid(g->pid, NULL, __WALL) < 0 && errno == EINTR)
		;
	close(g->daemon);
	munmap(g->nowhere, PAGE);
	munmap(g, size_of(g->nr_fds));
}

pid_t lp_guard_pid(const struct lp_guard *g)
{
	return g->pid;
}

static void know(struct lp_guard *g, int uffd, int32_t pid, int pidfd)
{
	int own = -1, before;

	if (!g || uffd < 0 || uffd >= g->nr_fds)
		return;
	/* who can't be killed is held */
	if (pid > 0 && (own = fcntl(pidfd, F_DUPFD_CLOEXEC, 1)) < 0)
		pid = 0;
	if (pid <= 0)
		atomic_store(&g->about[uffd].pid, pid);
	before = atomic_exchange(&g->about[uffd].pidfd, own < 0 ? 0 : own);
	if (pid > 0)
		atomic_store(&g->about[uffd].pid, pid);
	if (before)
		close(before);
}

void lp_guard_names(struct lp_guard *g, int uffd, pid_t pid, int pidfd)
{
	know(g, uffd, pid, pidfd);
}

void lp_guard_complete(struct lp_guard *g, int uffd)
{
	know(g, uffd, COMPLETE, -1);
}
