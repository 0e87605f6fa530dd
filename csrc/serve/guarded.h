/*
 * Guard regions (madvise(2), MADV_GUARD_INSTALL, Linux 6.13): pages that raise SIGSEGV when they are touched.  No event reports
 * them, and UFFDIO_COPY puts a page where a guard is, as if nothing were there (Linux 6.18; 7.2 says EEXIST; docs/kernel.md).
 * So on such kernels a copy to pages on which no thread has just faulted is preceded by a look.
 *
 * A task's page tables are seen through /proc/PID/pagemap.  A few of those are kept open for all tasks together, since
 * descriptors are few and tasks many.
 */
#ifndef LAZYPAGES_GUARDED_H
#define LAZYPAGES_GUARDED_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "address_space.h"

/* The first pages in [start, end) of that category; when none are, *found is empty, at end.  fd: a pagemap.  0 or -errno. */
int lp_guarded_scan(int fd, uint64_t category, uint64_t start, uint64_t end, struct lp_range *found);

#ifndef LP_CFFI
#define LP_GUARDED_OPEN 8 /* page tables kept open */

struct lp_guarded {
	uint64_t category; /* of pages that are not to be copied to, as PAGEMAP_SCAN has it; 0: no need to look, or no way */
	pthread_mutex_t lock;
	uint64_t uses;
	struct {
		const void *owner; /* NULL: none */
		int fd;		   /* -1 */
		unsigned users;
		uint64_t used; /* when, in uses */
	} kept[LP_GUARDED_OPEN];
};

/*
 * What a thread saw when it last looked: no guard in [from, to).  What follows there soon after is copied without another look,
 * as the end of a large piece is: a guard that is installed between look and copy is lost in any case.  Of a task that has
 * guards, which nearly none has, each few pages are looked at on their own.
 */
struct lp_look {
	uint64_t from, to, at; /* at: when, ns */
	uint64_t layout;       /* of the task, then */
};
#define LP_LOOK_NS 300000		  /* what copying so much takes, about: */
#define LP_LOOK_AHEAD ((uint64_t)1 << 20) /* bytes */
#define LP_LOOK_CLOSE ((uint64_t)8 << LP_PAGE_SHIFT)

/* Whose pages: the owner is a name for it, pidfd may be -1. */
struct lp_guarded_task {
	const void *owner;
	pid_t pid;
	int pidfd, uffd;
	const void *unreadable; /* for lp_uffd_probe */
};

/* Finds out whether this kernel's copies overwrite guards, and how guards are recognised. */
void lp_guarded_init(struct lp_guarded *g);
void lp_guarded_end(struct lp_guarded *g);

/*
 * The page tables of a task, to be given back: a descriptor; or -ESRCH when it has ended, and -errno when they can't be read:
 * -EMFILE, -ENFILE and -ENOMEM may pass.
 */
int lp_guarded_take(struct lp_guarded *g, const struct lp_guarded_task *task);
void lp_guarded_give(struct lp_guarded *g, const void *owner, int fd);
/* The task is freed: nothing of it is kept.  No thread has its page tables. */
void lp_guarded_forget(struct lp_guarded *g, const void *owner);
#endif

#endif
