#define _GNU_SOURCE
#include "smaps.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TRIES 100 /* for a descriptor; a fault may be waiting, so without a pause */

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
	FILE *file = fopen(path, "re");

	/* another thread may take the number that is let go of, but not for long: they are as short of them */
	for (int i = 0; !file && (errno == EMFILE || errno == ENFILE) && i < TRIES; i++) {
		int fd = atomic_exchange(&reserve, -1);

		if (fd >= 0)
			close(fd);
		else
			sched_yield();
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

struct mapping {
	uint64_t start, end;
	char perms[5];
	const char *flags; /* the line of VmFlags */
};

static int each_mapping(pid_t pid, int pidfd, void (*found)(void *arg, const struct mapping *mapping), void *arg)
{
	struct mapping mapping = {0};
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
			mapping.flags = line;
			found(arg, &mapping);
		} else {
			uint64_t from, to;
			char perms[5];

			/* a mapping's first line; no other has two numbers so */
			if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &from, &to, perms) == 3) {
				mapping.start = from;
				mapping.end = to;
				memcpy(mapping.perms, perms, sizeof(perms));
			}
		}
	}
	if (ferror(smaps))
		rc = errno ? -errno : -EIO;
	else if (!mapping.end)
		rc = -ESRCH;
	free(line);
	close_mappings(smaps);
	return rc;
}

struct each {
	void (*found)(void *arg, uint64_t start, uint64_t end, bool wiped);
	void *arg;
};

static void is_wiped(void *arg, const struct mapping *mapping)
{
	const struct each *each = arg;

	each->found(each->arg, mapping->start, mapping->end, strstr(mapping->flags, " wf "));
}

int lp_each_mapping(pid_t pid, int pidfd, void (*found)(void *arg, uint64_t start, uint64_t end, bool wiped), void *arg)
{
	struct each each = {found, arg};

	return each_mapping(pid, pidfd, is_wiped, &each);
}

struct sides {
	uint64_t edge, start, end;
	char before[256], after[256]; /* what is there; longer than any line of flags */
	bool sealed;
};

static void compare_sides(void *arg, const struct mapping *mapping)
{
	struct sides *s = arg;
	char *side = mapping->end == s->edge ? s->before : mapping->start == s->edge ? s->after : NULL;

	if (side)
		snprintf(side, sizeof(s->before), "%s %s", mapping->perms, mapping->flags);
	if (mapping->start < s->end && mapping->end > s->start && strstr(mapping->flags, " sl "))
		s->sealed = true;
}

bool lp_mappings_alike(pid_t pid, int pidfd, uint64_t edge, uint64_t start, uint64_t end)
{
	struct sides s = {.edge = edge, .start = start, .end = end};

	if (!pid || each_mapping(pid, pidfd, compare_sides, &s))
		return false;
	return s.sealed || (s.before[0] && !strcmp(s.before, s.after));
}

struct page {
	uint64_t addr;
	bool found, grows;
};

static void look_at_page(void *arg, const struct mapping *mapping)
{
	struct page *page = arg;

	if (page->addr < mapping->start || page->addr >= mapping->end)
		return;
	page->found = true;
	page->grows = strstr(mapping->flags, " gd ");
}

bool lp_mapping_grows(pid_t pid, int pidfd, uint64_t addr)
{
	struct page page = {.addr = addr};

	return !pid || each_mapping(pid, pidfd, look_at_page, &page) || !page.found || page.grows;
}

bool lp_is_mapped(pid_t pid, int pidfd, uint64_t addr)
{
	struct page page = {.addr = addr};

	return !pid || each_mapping(pid, pidfd, look_at_page, &page) || page.found;
}
