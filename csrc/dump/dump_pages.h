/*
 * Finding the pages of a task, and copying their bytes into a pages file.
 */
#ifndef LAZYPAGES_DUMP_PAGES_H
#define LAZYPAGES_DUMP_PAGES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "common/extent.h"

#define LP_PAGE_SIZE 4096

/* Categories of pages of the PAGEMAP_SCAN ioctl (linux/fs.h, Linux 6.7; GUARD: Linux 6.15). */
#define LP_PAGE_WPALLOWED 0x1
#define LP_PAGE_WRITTEN 0x2
#define LP_PAGE_FILE 0x4
#define LP_PAGE_PRESENT 0x8
#define LP_PAGE_SWAPPED 0x10
#define LP_PAGE_PFNZERO 0x20
#define LP_PAGE_HUGE 0x40
#define LP_PAGE_SOFT_DIRTY 0x80
#define LP_PAGE_GUARD 0x100

/* A run of pages: of a scan (flags: categories), or an entry of a pagemap (flags: LP_PARENT, LP_LAZY, LP_PRESENT). */
struct lp_run {
	uint64_t start; /* address */
	uint64_t end;
	uint64_t flags;
};

/* A search; see PAGEMAP_SCAN in Documentation/admin-guide/mm/pagemap.rst. */
struct lp_scan {
	uint64_t required; /* categories that a page must have */
	uint64_t excluded; /* categories that a page must not have */
	uint64_t any;	   /* a page must have at least one of these, unless 0 */
	uint64_t wanted;   /* categories reported in the flags of the runs */
	int protect;	   /* write-protect the pages that are found; -EPERM where the kernel does not allow it */
};

/*
 * Scans from *next up to end and stores *count runs in out. It is complete if *next is then end; else out is full.
 * Before Linux 6.7 it reads the entries of the file instead and does not report WPALLOWED, WRITTEN and HUGE.
 */
int lp_scan_pages(int pagemap_fd, const struct lp_scan *scan, uint64_t *next, uint64_t end, struct lp_run *out,
		  size_t room, size_t *count);

/* PE_* flags of a pagemap entry. */
#define LP_PARENT 1
#define LP_LAZY 2
#define LP_PRESENT 4

/*
 * Replaces categories by pagemap flags: `unchanged` for runs with all of `with` and none of `without`, else `changed`.
 */
void lp_label_runs(struct lp_run *runs, size_t nr_runs, uint64_t with, uint64_t without, uint64_t unchanged,
		   uint64_t changed);

/* Number of pages in runs that have all of `flags` (0: in all runs). */
uint64_t lp_count_run_pages(const struct lp_run *runs, size_t nr_runs, uint64_t flags);

/*
 * The functions below make new runs of the same pages, in the same order, and return their number; at most `room` are
 * stored.
 */

/* Removes LAZY from the given pages (sorted addresses). A page without another flag becomes PRESENT. */
size_t lp_pin_pages(const struct lp_run *runs, size_t nr_runs, const uint64_t *pages, size_t nr_pages,
		    struct lp_run *out, size_t room);

/*
 * Removes PARENT from pages whose data no level of the chain has (`held`: the chain's extents). Such a page becomes
 * PRESENT; without `present` a LAZY one stays LAZY only.
 */
size_t lp_check_parent(const struct lp_run *runs, size_t nr_runs, const struct lp_extent *held, size_t nr_held,
		       int present, struct lp_run *out, size_t room);

/*
 * Gives PARENT, instead of PRESENT, to the pages that lie in a run of `others` with PARENT (sorted by address). Without
 * `lazy` they lose LAZY.
 */
size_t lp_mark_unchanged(const struct lp_run *runs, size_t nr_runs, const struct lp_run *others, size_t nr_others,
			 int lazy, struct lp_run *out, size_t room);

/*
 * Appends a run, or lengthens the last one if it ends there and has the same flags. Beyond `room` runs, they are only counted.
 */
void lp_append_run(struct lp_run *out, size_t room, size_t *count, uint64_t start, uint64_t end, uint64_t flags);

/* The parent levels, for comparison. */
struct lp_parent {
	const struct lp_extent *held; /* where the chain has each page */
	size_t nr_held;
	const int *levels; /* descriptors of the pages files, -1: none */
};

/* Position of a copy in its runs. */
struct lp_cursor {
	size_t run;	 /* index */
	uint64_t offset; /* in this run, bytes */
};

struct lp_copy {
	pid_t pid;
	uint64_t base; /* added to the addresses of the runs when they are read */
	int mem_fd;   /* /proc/<pid>/mem, for memory that process_vm_readv can't read (PROT_NONE); else -1 */
	int pages_fd; /* written at its file position */
	int durable;	  /* start writeback of pages_fd at once: an fsync will follow */
	int drop_zero;	  /* leave out pages that are all zero */
	int drop_missing; /* leave out pages that can't be read; else they are an error, -EFAULT */
	const struct lp_parent *parent; /* or NULL. Pages with the same bytes as there are not written */
	uint64_t same_lazy;		/* flags of such pages if they were LAZY; the others get PARENT */
	unsigned char *buffer; /* two buffers, one behind the other: one is filled while the other is written */
	size_t buffer_size;    /* bytes of one buffer, whole pages */
};

/*
 * Copies the PRESENT pages from *cursor on, until about max_pages were read or all runs are done (cursor->run ==
 * nr_runs), and appends the resulting pagemap entries to out, sorted, adjacent ones with the same flags merged.
 * `room` must be at least max_pages + nr_runs + the number of entries already there. *written is increased by the
 * number of pages written. 0 or -errno.
 */
int lp_copy_pages(const struct lp_copy *copy, const struct lp_run *runs, size_t nr_runs, struct lp_cursor *cursor,
		  uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out, uint64_t *written);

#endif
