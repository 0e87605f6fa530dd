/*
 * Probe a userfaultfd without side effects: UFFDIO_COPY from an unreadable source page.
 */
#ifndef LAZYPAGES_PROBE_H
#define LAZYPAGES_PROBE_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include <linux/userfaultfd.h>

#define LP_ANYWHERE ((uint64_t)1 << 38) /* an address in every task's address space, mapped or not */

/*
 * The errno of a copy to this page.  EAGAIN: the layout is changing, or an event has not been read.  ENOENT: the page is not
 * registered.  ESRCH: the task has exited.  nowhere: an unreadable page, so that nothing is copied.
 */
static inline int lp_probe(int uffd, const void *nowhere, uint64_t addr)
{
	struct uffdio_copy copy = {.dst = addr, .src = (uintptr_t)nowhere, .len = 4096};

	if (!ioctl(uffd, UFFDIO_COPY, &copy))
		return 0; /* impossible */
	return copy.copy < 0 ? (int)-copy.copy : errno;
}

/*
 * The same for all pages of [start, end) at once.  Returns 0 if they are in one registered mapping.  Source address 0 is
 * unreadable for any length.  A copy to a range that a huge page maps fails with EEXIST.
 */
static inline int lp_probe_range(int uffd, uint64_t start, uint64_t end)
{
	struct uffdio_copy copy = {.dst = start, .len = end - start};
	int error;

	if (!ioctl(uffd, UFFDIO_COPY, &copy))
		return 0; /* impossible */
	error = copy.copy < 0 ? (int)-copy.copy : errno;
	return error == EFAULT || error == EEXIST ? 0 : error;
}

/* Whether a copy's errno shows that the task has exited: ESRCH; ENOSPC in Linux 4.11 to 4.12 (ioctl_userfaultfd(2)). */
static inline bool lp_means_gone(int error)
{
	return error == ESRCH || error == ENOSPC;
}

#endif
