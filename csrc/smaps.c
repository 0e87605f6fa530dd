#define _GNU_SOURCE
#include "smaps.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int lp_each_mapping(pid_t pid, int pidfd, void (*found)(void *arg, uint64_t start, uint64_t end, bool wiped), void *arg)
{
	uint64_t start = 0, end = 0;
	char path[32], *line = NULL;
	size_t size = 0;
	FILE *smaps;
	int rc = 0;

	snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
	smaps = fopen(path, "re");
	if (!smaps)
		return -errno;
	/* from here on it is about the memory that the process had (fs/proc/task_mmu.c, proc_maps_open): was it the right one? */
	if (pidfd >= 0 && syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0)) {
		rc = -errno;
		fclose(smaps);
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
	fclose(smaps);
	return rc;
}
