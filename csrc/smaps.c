#define _GNU_SOURCE
#include "smaps.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TRIES 1000 /* for a descriptor, 1 ms apart */

static atomic_int reserve = -1;

int lp_mappings_reserve(void)
{
	int before, fd = open("/", O_PATH | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	before = atomic_exchange(&reserve, fd);
	if (before >= 0)
		close(before);
	return 0;
}

static FILE *open_mappings(const char *path)
{
	const struct timespec pause = {.tv_nsec = 1000000};
	FILE *file = fopen(path, "re");

	/* another thread may take the number that is let go of, but not for long: they are as short of them */
	for (int i = 0; !file && (errno == EMFILE || errno == ENFILE) && i < TRIES; i++) {
		int fd = atomic_exchange(&reserve, -1);

		if (fd >= 0)
			close(fd);
		else
			nanosleep(&pause, NULL);
		file = fopen(path, "re");
	}
	return file;
}

static void close_mappings(FILE *file)
{
	fclose(file);
	if (atomic_load(&reserve) < 0)
		lp_mappings_reserve();
}

int lp_each_mapping(pid_t pid, int pidfd, void (*found)(void *arg, uint64_t start, uint64_t end, bool wiped), void *arg)
{
	uint64_t start = 0, end = 0;
	char path[32], *line = NULL;
	size_t size = 0;
	FILE *smaps;
	int rc = 0;

	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
	smaps = open_mappings(path);
	if (!smaps)
		return -errno;
	/* from here on it is about the memory that the process had (fs/proc/task_mmu.c, proc_maps_open): was it the right one? */
	if (pidfd >= 0 && syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0)) {
		rc = -errno;
		close_mappings(smaps);
		return rc;
	}
	while (getline(&line, &size, smaps) > 0) {
		if (!strncmp(line, "VmFlags:", 8)) {
			found(arg, start, end, strstr(line, " wf "));
		} else {
			uint64_t from, to;

			/* a mapping's first line; no other has two numbers so */
			if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) {
				start = from;
				end = to;
			}
		}
	}
	if (ferror(smaps))
		rc = errno ? -errno : -EIO;
	else if (!end)
		rc = -ESRCH;
	free(line);
	close_mappings(smaps);
	return rc;
}
