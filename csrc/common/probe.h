/*
 * What a uffd says of a page without anything being done to it: a copy that has nothing to copy.
 */
#ifndef LAZYPAGES_PROBE_H
#define LAZYPAGES_PROBE_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include <linux/userfaultfd.h>

#define LP_ANYWHERE ((uint64_t)1 << 38) /* an address that every task can have */

/*
 * What a copy to this page would meet: EAGAIN when the layout is changing or an event of it has not been read, else ENOENT
 * when the page is not registered (any more), ESRCH when the task is gone.  nowhere: a page that can't be read, so nothing is
 * copied.
 */
static inline int lp_probe(int uffd, const void *nowhere, uint64_t addr)
{
	struct uffdio_copy copy = {.dst = addr, .src = (uintptr_t)nowhere, .len = 4096};

	if (!ioctl(uffd, UFFDIO_COPY, &copy))
		return 0; /* can't be */
	return copy.copy < 0 ? (int)-copy.copy : errno;
}

/*
 * The same of all pages of [start, end) at once: 0 when they are within one mapping that is registered.  From address 0 nothing
 * can be read, however long it is; EEXIST is said of what a huge page maps.
 */
static inline int lp_probe_range(int uffd, uint64_t start, uint64_t end)
{
	struct uffdio_copy copy = {.dst = start, .len = end - start};
	int error;

	if (!ioctl(uffd, UFFDIO_COPY, &copy))
		return 0; /* can't be */
	error = copy.copy < 0 ? (int)-copy.copy : errno;
	return error == EFAULT || error == EEXIST ? 0 : error;
}

static inline bool lp_means_gone(int error)
{
	return error == ESRCH || error == ENOSPC;
}

#endif
