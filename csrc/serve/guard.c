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
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/futex.h>

#include "common/page.h"
#include "guard_inner.h"

#define NAME "uffd-guard" /* matched by no pattern that is meant for the daemon: killall lazypages, pkill -f "lazypages serve" */
#define LEAVE_LOOKS 50 /* LP_GUARD_LOOK_MS apart: how long the daemon's end waits for tasks that are ending */
#define LARGE (128u << 10) /* bytes: a mapping of this size is no library's */

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

/* Makes the guard differ from the daemon for tools that look for processes by name or command line (pkill(1), killall(1)). */
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
	lp_guard_take_over(g);
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
	const struct timespec look = {.tv_nsec = LP_GUARD_LOOK_MS * 1000000};
	sigset_t all, before;
	int pidfd = -1, error;
	pid_t pid;

	atomic_store(&g->ready, 0);
	/* none of the daemon's signal handlers may run in the second process */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	inherit_heap(g, MADV_DONTFORK);
	/* as fork(2), but for the file descriptors; no signal reports its end, the pidfd does */
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
	/* a tool that looks for the daemon by its command line must not find this process, too */
	for (int i = 0; i < LEAVE_LOOKS && !atomic_load(&g->ready) && !has_ended(g); i++)
		syscall(SYS_futex, &g->ready, FUTEX_WAIT, 0, &look, NULL, 0);
	return 0;
}

static void free_guard(struct lp_guard *g)
{
	if (g->daemon >= 0)
		close(g->daemon);
	if (g->unreadable != MAP_FAILED)
		munmap(g->unreadable, LP_PAGE_SIZE);
	munmap(g, sizeof(*g));
}

struct lp_guard *lp_guard_start(int log_fd, bool json, int shared)
{
	struct lp_guard *g = mmap(NULL, sizeof(*g), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int rc;

	if (g == MAP_FAILED)
		return NULL;
	g->pidfd = -1;
	g->log_fd = log_fd;
	g->shared = shared;
	g->json = json;
	g->unreadable = mmap(NULL, LP_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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
	bool any = !fds; /* not known */
	struct dirent *entry;

	while (fds && !any && (entry = readdir(fds))) {
		int fd = atoi(entry->d_name);

		any = fd > 0 && fd < LP_GUARD_FDS && lp_is_uffd(fd) && atomic_load(&g->about[fd].pid) != LP_GUARD_COMPLETE && !lp_guard_is_gone(g, fd);
	}
	if (fds)
		closedir(fds);
	return any;
}

void lp_guard_end(struct lp_guard *g)
{
	const struct timespec pause = {.tv_nsec = LP_GUARD_LOOK_MS * 1000000};

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
	know(g, uffd, LP_GUARD_COMPLETE, -1);
}

void lp_guard_close(struct lp_guard *g, int uffd)
{
	if (g) { /* the number stays taken until nothing is known of it any more */
		dup3(g->daemon, uffd, O_CLOEXEC);
		know(g, uffd, 0, -1);
	}
	close(uffd);
}

void lp_guard_leave(struct lp_guard *g, int uffd)
{
	int bound;

	if (!g || uffd < 0 || uffd >= LP_GUARD_FDS || atomic_exchange(&g->about[uffd].left_behind, true))
		return;
	bound = atomic_load(&g->left_bound);
	while (bound <= uffd && !atomic_compare_exchange_weak(&g->left_bound, &bound, uffd + 1))
		;
	atomic_fetch_add(&g->left_behind, 1);
}

int lp_guard_close_gone(struct lp_guard *g)
{
	int bound = atomic_load(&g->left_behind) ? atomic_load(&g->left_bound) : 0;

	for (int fd = 0; fd < bound; fd++) {
		if (!atomic_load(&g->about[fd].left_behind) || !lp_guard_is_gone(g, fd))
			continue;
		atomic_store(&g->about[fd].left_behind, false);
		atomic_fetch_sub(&g->left_behind, 1);
		lp_guard_close(g, fd);
	}
	return atomic_load(&g->left_behind);
}

bool lp_guard_needs(const struct lp_guard *g, int pidfd)
{
	int bound = atomic_load(&g->left_behind) ? atomic_load(&g->left_bound) : 0;

	for (int fd = 0; fd < bound; fd++)
		if (atomic_load(&g->about[fd].left_behind) && atomic_load(&g->about[fd].pid) > 0 &&
		    atomic_load(&g->about[fd].pidfd) == pidfd)
			return true;
	return false;
}
