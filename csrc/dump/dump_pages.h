/*
 * Which pages a task has, and their bytes on the way into a pages file.
 */
#ifndef LAZYPAGES_DUMP_PAGES_H
#define LAZYPAGES_DUMP_PAGES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "common/extent.h"

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
 * Before Linux 6.7 the entries of the file are read instead: WPALLOWED, WRITTEN and HUGE are not told then.
 */
int lp_scan_pages(int pagemap_fd, const struct lp_scan *scan, uint64_t *next, uint64_t end, struct lp_run *out,
		  size_t room, size_t *count);

/* PE_* of a pagemap. */
#define LP_PARENT 1
#define LP_LAZY 2
#define LP_PRESENT 4

/*
 * From categories to flags: `unchanged` for the runs that have all of `with` and none of `without`, else `changed`.
 */
void lp_label_runs(struct lp_run *runs, size_t nr_runs, uint64_t with, uint64_t without, uint64_t unchanged,
		   uint64_t changed);

/* How many pages have all of `flags` (0: all pages). */
uint64_t lp_count_pages(const struct lp_run *runs, size_t nr_runs, uint64_t flags);

/*
 * The functions below make new runs of the same pages, in order, and return how many; no more than `room` are stored.
 */

/* Without LAZY on the given pages (sorted addresses); one that has no other flag then becomes PRESENT. */
size_t lp_pin_pages(const struct lp_run *runs, size_t nr_runs, const uint64_t *pages, size_t nr_pages,
		    struct lp_run *out, size_t room);

/*
 * Without PARENT where no level of the chain that `held` was resolved from has the data. Such a page becomes PRESENT,
 * but keeps LAZY alone if it has that and not `present`.
 */
size_t lp_check_parent(const struct lp_run *runs, size_t nr_runs, const struct lp_extent *held, size_t nr_held,
		       int present, struct lp_run *out, size_t room);

/* Levels of a chain, to compare pages with. */
struct lp_parent {
	const struct lp_extent *held; /* of the chain */
	size_t nr_held;
	const int *levels; /* pages files; -1: not there */
};

/* Where a copy of many runs has come to. */
struct lp_cursor {
	size_t run;	 /* index */
	uint64_t offset; /* bytes of it that are done */
};

struct lp_copy {
	pid_t pid;
	int mem_fd;   /* of /proc/<pid>/mem, for what process_vm_readv may not read (PROT_NONE); else -1 */
	int pages_fd; /* written at its position */
	int durable;	  /* have the disk begin to write what is in pages_fd at once: there will be an fsync */
	int drop_zero;	  /* leave out pages that are all zero */
	int drop_missing; /* leave out pages that can't be read; else they are -EFAULT */
	const struct lp_parent *parent; /* NULL: not compared. Pages with the same bytes there are not written: */
	uint64_t same_lazy;		/* what becomes of LAZY ones; others become PARENT */
	unsigned char *buffer; /* two of them: one is read into while the other is written */
	size_t buffer_size;    /* of each, bytes, whole pages */
};

/*
 * Copy on the PRESENT ones from *cursor until about max_pages were looked at or all are done (cursor->run ==
 * nr_runs), and append to out what the pagemap has to say: sorted, adjoining ones with the same flags as one.
 * `room` must be at least max_pages + nr_runs + what was there. *written: pages, added to.
 */
int lp_copy_pages(const struct lp_copy *copy, const struct lp_run *runs, size_t nr_runs, struct lp_cursor *cursor,
		  uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out, uint64_t *written);

#endif
