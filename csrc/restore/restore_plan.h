/*
 * The plan: what lazypages/restore/ (Python) decides and the restorer executes, op after op.
 *
 * A header, then ops.  An op is struct lp_op, its label (text for messages), its body
 * (one of the structs below and what follows it); label and body are padded to 8 bytes.
 * All numbers are little-endian.  lazypages/restore/plan.py is the writer.
 *
 * A *thread* is an index into the threads of the plan (a process is the thread that leads it),
 * LP_NONE is the restorer itself.  A *slot* is a file that the restorer has open.
 */
#ifndef LAZYPAGES_RESTORE_PLAN_H
#define LAZYPAGES_RESTORE_PLAN_H

#include <stdint.h>

#include "common/extent.h"

#define LP_PLAN_MAGIC 0x4e414c5052504cULL /* "LPRPLAN" */
#define LP_PLAN_VERSION 1
#define LP_NONE 0xffffffffu

/*
 * The scratch area of a task under construction, at header.scratch: a page of code, room for data
 * (what LP_CALL hands to system calls), then header.parking bytes where vvar and vdso wait.
 */
#define LP_SCRATCH_CODE 4096
#define LP_SCRATCH_DATA 65536

struct lp_plan {
	uint64_t magic;
	uint32_t version;
	uint32_t nr_ops;
	uint32_t nr_threads;
	uint32_t nr_slots;
	uint64_t size;	    /* of the whole plan, bytes */
	uint64_t scratch;   /* address, free in the restorer and in all tasks */
	uint64_t parking;   /* bytes */
	uint32_t link_fd;   /* descriptor under which tasks reach the restorer until they are done */
	int32_t control_fd; /* the daemon's control socket, -1 without one */
	int32_t log_fd;	    /* errors go there too; -1 without one */
	uint32_t verbose;   /* 1: say each op there (or on stderr) */
};

struct lp_op {
	uint32_t kind;
	uint32_t thread;
	uint32_t label_size; /* with its NUL, without padding */
	uint32_t body_size;  /* without padding */
};

enum lp_op_kind {
	/* Files of the restorer. */
	LP_OPEN = 1, /* lp_open, path */
	LP_PIPE,     /* lp_pipe, contents */
	LP_REOPEN,   /* lp_reopen */
	LP_SHARED,   /* lp_shared */
	LP_CLOSE,    /* lp_close */
	LP_WRITE,    /* lp_write, path with its NUL, text */
	/* Tasks. */
	LP_SPAWN,  /* lp_spawn: `thread` is made */
	LP_CALL,   /* lp_call_body, data for the scratch area */
	LP_GIVE,   /* lp_give: a slot becomes a descriptor of the task */
	LP_SWITCH, /* lp_place...: the restorer's memory goes, vvar and vdso move */
	LP_FILL,   /* lp_fill, slots, ranges, extents: page contents */
	LP_EXIT,   /* lp_exit: becomes a zombie */
	LP_REAP,   /* lp_reap: `thread` waits for a helper that is killed */
	LP_DRAIN,  /* no body: pending signals, from building, are thrown away */
	LP_REGS,   /* lp_regs, components of the xsave area: the last op of a thread */
	/* The daemon. */
	LP_UFFD,     /* lp_uffd, ranges */
	LP_ANNOUNCE, /* lp_announce: a zombie */
	LP_FINISH,   /* no body */
	/* All. */
	LP_GO,	 /* no body: let all tasks run */
	LP_WAIT, /* no body: wait for `thread`, the process, and exit as it did */
};

struct lp_open {
	uint32_t slot;
	uint32_t flags;	   /* O_* */
	uint64_t position; /* 0: leave it */
};

struct lp_pipe {
	uint32_t reader, writer; /* slots */
	uint64_t capacity;	 /* bytes, 0: leave it */
};

/* A description of its own for what another slot has open. */
struct lp_reopen {
	uint32_t slot, from;
	uint32_t flags, unused; /* O_* */
};

/* Shared anonymous memory: a slot to map, and to LP_FILL. */
struct lp_shared {
	uint32_t slot, unused;
	uint64_t size;
};

struct lp_close {
	uint32_t slot, unused;
};

struct lp_write {
	uint32_t flags; /* O_* of the open */
	uint32_t path_size;
};

struct lp_spawn {
	uint32_t parent; /* thread that clones; LP_NONE: the restorer */
	int32_t tid;
	uint64_t flags; /* CLONE_* */
};

/* The result must not be an error; with `exact` it must be `result`. */
struct lp_call_body {
	uint64_t nr;
	uint64_t args[6]; /* pointers: data is at header.scratch + LP_SCRATCH_CODE */
	uint64_t exact;
	uint64_t result;
};

struct lp_give {
	uint32_t slot, fd;
	uint32_t cloexec, unused;
};

struct lp_place {
	uint64_t start, size;
};

/* What LP_FILL does in a range with extents that are lazy, or not. */
#define LP_TAKE_EAGER 1
#define LP_TAKE_LAZY 2

struct lp_fill_range {
	uint64_t start, end;
	uint64_t take;
};

/*
 * Extents and ranges are sorted.  Of the task, or (LP_NONE) of the LP_SHARED slot `shared` with addresses from
 * 0 on.  The task uses descriptor 0 meanwhile.
 */
struct lp_fill {
	uint32_t shared;
	uint32_t nr_levels; /* uint32_t slots follow, padded to 8; LP_NONE: no pages file */
	uint64_t nr_ranges; /* struct lp_fill_range follow */
	uint64_t nr_extents; /* struct lp_extent follow */
};

struct lp_exit {
	uint32_t status, unused; /* as wait() gives it */
};

struct lp_reap {
	uint32_t helper, unused;
};

struct lp_regs {
	uint64_t gp[27]; /* struct user_regs_struct */
	uint64_t blocked;
	uint64_t stop; /* 1: the process is in job-control stop */
	uint64_t xstate_bv;
	uint8_t fxsave[512];
	/* struct lp_component follow, each with its bytes padded to 8 */
};

struct lp_component {
	uint32_t nr;   /* bit number in xstate_bv */
	uint32_t size; /* bytes */
};

struct lp_uffd {
	int32_t pid;
	uint32_t nr_ranges; /* struct lp_place follow */
};

struct lp_announce {
	int32_t pid;
	uint32_t unused;
};

#endif
