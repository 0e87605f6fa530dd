/*
 * Which pages a task has, and their bytes on the way into a pages file.
 */
#ifndef LAZYPAGES_DUMP_PAGES_H
#define LAZYPAGES_DUMP_PAGES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "extent.h"

#define LP_PAGE_SIZE 4096

/* Categories of pages as the PAGEMAP_SCAN ioctl has them (linux/fs.h, since 6.7; GUARD since 6.15). */
#define LP_PAGE_WPALLOWED 0x1
#define LP_PAGE_WRITTEN 0x2
#define LP_PAGE_FILE 0x4
#define LP_PAGE_PRESENT 0x8
#define LP_PAGE_SWAPPED 0x10
#define LP_PAGE_PFNZERO 0x20
#define LP_PAGE_HUGE 0x40
#define LP_PAGE_SOFT_DIRTY 0x80
#define LP_PAGE_GUARD 0x100

/* A run of pages: what a scan found (flags: categories), or an entry of a pagemap (flags: PARENT 1, LAZY 2, PRESENT 4). */
struct lp_run {
	uint64_t start; /* address */
	uint64_t end;
	uint64_t flags;
};

/* What to look for; see PAGEMAP_SCAN in Documentation/admin-guide/mm/pagemap.rst. */
struct lp_scan {
	uint64_t required; /* categories that a page must have, */
	uint64_t excluded; /* must not have, */
	uint64_t any;	   /* must have one of (0: does not matter) */
	uint64_t wanted;   /* to be told apart in the flags of the runs */
	int protect;	   /* write-protect what is found; -EPERM where that can't be done */
};

/*
 * Scan from *next up to end; *count runs were found in out. Done when *next has become end, else out is full.
 */
int lp_scan_pages(int pagemap_fd, const struct lp_scan *scan, uint64_t *next, uint64_t end, struct lp_run *out,
		  size_t room, size_t *count);

/*
 * The same pages as in `runs`, but with the flags `flag` replaced by `instead` where no level of the chain that
 * `held` was resolved from holds the data. Both are sorted. Returns how many runs that makes, which may be
 * more than the room that there was for them.
 */
size_t lp_keep_flag_within(const struct lp_run *runs, size_t nr_runs, const struct lp_extent *held, size_t nr_held,
			   uint64_t flag, uint64_t instead, struct lp_run *out, size_t room);

/* Where a copy of many runs has come to. */
struct lp_cursor {
	size_t run;	 /* index */
	uint64_t offset; /* bytes of it that are done */
};

struct lp_copy {
	pid_t pid;
	int mem_fd;   /* of /proc/<pid>/mem, for what process_vm_readv may not read (PROT_NONE); else -1 */
	int pages_fd; /* written at its position */
	int drop_zero;	  /* leave out pages that are all zero */
	int drop_missing; /* leave out pages that can't be read; else they are -EFAULT */
	uint64_t copy_flag; /* runs without this flag are passed on uncopied */
	unsigned char *buffer;
	size_t buffer_size; /* bytes, whole pages */
};

/*
 * Copy on from *cursor until about max_pages were looked at or all are done (cursor->run == nr_runs), and
 * append to out the runs as they are now in the pages file: sorted, adjoining ones with the same flags as one.
 * `room` must be at least max_pages + nr_runs + what was there. *written: pages, added to.
 */
int lp_copy_pages(const struct lp_copy *copy, const struct lp_run *runs, size_t nr_runs, struct lp_cursor *cursor,
		  uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out, uint64_t *written);

#endif
