/*
 * What happened when: a record for every fault and every transfer, through a ring in memory into a file.
 *
 * Any thread may put records; that is lock-free and never waits.  When the ring is full a record is dropped, and counted.  One
 * thread of its own (lp_trace_run) takes them out and writes them, so that no fault ever waits for a disk.  docs/trace.md
 * describes the file; what comes before the records there is the owner's.
 */
#ifndef LAZYPAGES_TRACE_H
#define LAZYPAGES_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum lp_trace_kind {
	LP_TRACE_MEMORY = 1, /* a memory is served from now on: pages wait; detail: the memory that it was forked from, or 0 */
	LP_TRACE_FAULT,	     /* a thread waits for the page */
	LP_TRACE_ANSWERED,   /* the fault read `detail` ns ago, on one of these pages, has it */
	LP_TRACE_LEFT,	     /* a fault: another thread is about to bring the page */
	LP_TRACE_PUT_OFF,    /* a fault: the layout is changing */
	LP_TRACE_BROUGHT,    /* in the background; the copy took `detail` ns */
	LP_TRACE_WANTED,     /* asked of a remote source, for a fault; detail: address at dump time */
	LP_TRACE_FETCHED,    /* the same, while no thread waits */
	LP_TRACE_ARRIVED,    /* from a remote source, and placed, which took `detail` ns; pages as they came */
	LP_TRACE_LOST,	     /* no source has them; detail: errno */
	LP_TRACE_POISONED,
	LP_TRACE_FORKED,     /* the layout of the task changed: reported by the kernel, made here */
	LP_TRACE_REMOVED,
	LP_TRACE_UNMAPPED,
	LP_TRACE_REMAPPED,   /* detail: where to */
	LP_TRACE_COMPLETE,   /* nothing is missing any more */
	LP_TRACE_GONE,	     /* the memory does not exist any more */
	LP_TRACE_DROPPED,    /* not the task's: `pages` records were dropped up to now */
	LP_TRACE_END,	     /* the last record of a file that was written to its end; pages as in LP_TRACE_DROPPED */
	LP_TRACE_RESTORED,   /* not one task's: the restore has finished, all tasks run; put by Python */
};

/* Beside the levels 0, 1, ... of the chain of images. */
enum { LP_TRACE_NO_SOURCE = 0xffff, LP_TRACE_REMOTE = 0xfffe, LP_TRACE_NOWHERE = 0xfffd, LP_TRACE_ZERO = 0xfffc };

struct lp_trace_record {
	uint64_t time; /* CLOCK_MONOTONIC, ns */
	uint64_t addr; /* of the first page */
	uint64_t pages;
	uint64_t detail;
	uint32_t task;	 /* its tag */
	uint32_t memory; /* its number: 1, 2, ... as they came; that of a forked child is not its parent's */
	uint16_t kind, source;
	uint32_t times; /* of LP_TRACE_ANSWERED: how many faults it answered, else 0 */
};

struct lp_trace;

/* A ring for `records` (a power of two).  NULL with errno set. */
struct lp_trace *lp_trace_new(size_t records);
void lp_trace_free(struct lp_trace *trace);
/* False when it was dropped. */
bool lp_trace_put(struct lp_trace *trace, const struct lp_trace_record *record);
/* Writes what there is to fd; for one thread.  Records written, or -errno: then some are lost, and count as dropped. */
int64_t lp_trace_drain(struct lp_trace *trace, int fd);
/* The same again and again until lp_trace_stop, and then a last time, with LP_TRACE_END after it.  0 or -errno. */
int lp_trace_run(struct lp_trace *trace, int fd);
void lp_trace_stop(struct lp_trace *trace);
uint64_t lp_trace_written(const struct lp_trace *trace);
uint64_t lp_trace_dropped(const struct lp_trace *trace);

#endif
