#include "smaps.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int lp_each_wiped(pid_t pid, void (*found)(void *arg, uint64_t start, uint64_t end), void *arg)
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
	while (getline(&line, &size, smaps) > 0) {
		if (!strncmp(line, "VmFlags:", 8)) {
			if (strstr(line, " wf "))
				found(arg, start, end);
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
	free(line);
	fclose(smaps);
	return rc;
}
