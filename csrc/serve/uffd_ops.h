/*
 * What can be done to a userfaultfd: these are the only ioctls on one in csrc/serve.  Each makes one system call, counts nothing
 * and decides nothing.
 */
#ifndef LAZYPAGES_UFFD_OPS_H
#define LAZYPAGES_UFFD_OPS_H

#include <stdbool.h>
#include <stdint.h>

#define LP_ANYWHERE ((uint64_t)1 << 38) /* an address that every task can have */

enum lp_outcome {
	LP_DONE,
	LP_PRESENT,	 /* EEXIST: a page is there, or a guard */
	LP_CHANGING,	 /* EAGAIN: the layout is changing, or an event of it has not been read */
	LP_LATER,	 /* ENOMEM, EINTR: worth another try */
	LP_TASK_GONE, /* ESRCH, ENOSPC: the task's memory does not exist any more */
	LP_UNREGISTERED, /* ENOENT: not within one mapping that is registered */
	LP_FAILED,	 /* the error says why: EFAULT (the source can't be read), EINVAL (this kernel can't), ... */
};

struct lp_result {
	enum lp_outcome outcome; /* of the first page that was not done; LP_DONE: there is none */
	int error;		 /* its errno, 0 for LP_DONE */
	uint64_t nr_pages;	 /* that were done before it */
};

/* Whether what failed may be tried again with the same. */
static inline bool lp_may_pass(enum lp_outcome outcome)
{
	return outcome == LP_CHANGING || outcome == LP_LATER;
}

/* quiet: threads that wait for these pages are not woken. */
struct lp_result lp_uffd_copy(int uffd, uint64_t addr, const void *src, uint64_t nr_pages, bool quiet);
struct lp_result lp_uffd_zero(int uffd, uint64_t addr, bool quiet); /* one page */
struct lp_result lp_uffd_poison(int uffd, uint64_t addr, uint64_t nr_pages);
/* No error matters: a thread that can't be woken does not wait there. */
void lp_uffd_wake(int uffd, uint64_t addr, uint64_t nr_pages);
/*
 * What a copy to this page would meet, without one: LP_CHANGING, else LP_UNREGISTERED, else LP_FAILED, when it could be copied
 * to; LP_TASK_GONE.  unreadable: a page that can't be read.
 */
enum lp_outcome lp_uffd_probe(int uffd, const void *unreadable, uint64_t addr);
/* The same of all pages in [start, end) at once: LP_DONE when they are within one mapping that is registered. */
struct lp_result lp_uffd_probe_range(int uffd, uint64_t start, uint64_t end);

/* A uffd for this process itself, to find out what the kernel does: -1 with errno. */
int lp_uffd_open(uint64_t features);
/* Faults on missing pages of this process are reported from here on. */
bool lp_uffd_register(int uffd, const void *start, uint64_t nr_pages);

#endif
