#define _GNU_SOURCE
#include "calls.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Reads a small file of a thread as a string.  Returns 0 or -errno. */
static int read_text(int tasks, const char *tid, const char *name, char *text, size_t size)
{
	char path[64];
	ssize_t n;
	int fd;

	if ((size_t)snprintf(path, sizeof(path), "%s/%s", tid, name) >= sizeof(path))
		return -ENAMETOOLONG;
	fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = read(fd, text, size - 1);
	if (n < 0)
		n = -errno;
	close(fd);
	text[n > 0 ? n : 0] = 0;
	return n < 0 ? (int)n : 0;
}

/* Whether the thread waits in userfaultfd, and not, say, for the mmap lock.  Kernels without that information report "0". */
static bool waits_for_a_reader(int tasks, const char *tid)
{
	char where[64];

	return !read_text(tasks, tid, "wchan", where, sizeof(where)) && (strstr(where, "userfaultfd") || !strcmp(where, "0"));
}

/* Whether the thread's call unmaps [start, end) and waits for a reader: 1, 0, or -errno. */
static int reports_departure(int tasks, const char *tid, uint64_t start, uint64_t end)
{
	uint64_t addr, len;
	char text[256];
	long call;
	int rc = read_text(tasks, tid, "syscall", text, sizeof(text));

	if (rc)
		return rc;
	if (sscanf(text, "%ld %" SCNx64 " %" SCNx64, &call, &addr, &len) != 3) /* "running" */
		return 0;
	return (call == SYS_munmap || call == SYS_mmap || call == SYS_mremap) && addr <= start && start - addr < len &&
	       end - addr <= len + 4095 && waits_for_a_reader(tasks, tid);
}

int lp_reports_departure(pid_t pid, int pidfd, uint64_t start, uint64_t end)
{
	int found = 0, error = 0, seen = 0;
	struct dirent *entry;
	char path[32];
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
	tasks = opendir(path);
	if (!tasks)
		return -errno;
	/* The open directory refers to this process from now on, also if its pid is reused.  Is it the one of pidfd? */
	if (pidfd >= 0 && syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0))
		error = -errno;
	while (!error && !found && (entry = readdir(tasks))) {
		int rc;

		if (entry->d_name[0] == '.')
			continue;
		rc = reports_departure(dirfd(tasks), entry->d_name, start, end);
		found = rc == 1;
		seen += rc >= 0;
		if (rc < 0 && rc != -ENOENT && rc != -ESRCH) /* else the thread has ended */
			error = rc;
	}
	closedir(tasks);
	return found ? 1 : error ? error : seen ? 0 : -ESRCH;
}
