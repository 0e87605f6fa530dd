/*
 * The plan: decided by lazypages/restore/ (Python), executed by the restorer, op by op.
 *
 * A header (struct lp_plan), then ops.  An op consists of struct lp_op, its label (text for messages), and its body
 * (one of the structs below and what follows it); label and body are padded to 8 bytes.
 * All numbers are little-endian.  lazypages/restore/plan.py writes it.
 *
 * A *thread* is an index into the threads of the plan; a process is identified by its leader.
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
 * The scratch area of a task under construction, at plan.scratch: a page of code, room for data
 * (arguments of system calls from LP_CALL), then plan.parking bytes for vvar and vdso while the other memory is replaced.
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
	uint64_t scratch;   /* address that is free in the restorer and in all tasks */
	uint64_t parking;   /* bytes */
	uint32_t link_fd;   /* descriptor by which unfinished tasks reach the restorer */
	int32_t control_fd; /* the daemon's control socket, -1: no daemon */
	int32_t log_fd;	    /* a log file for errors, -1: none */
	uint32_t verbose;   /* 1: log each op there, or to stderr */
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
	LP_SPAWN,  /* lp_spawn: creates `thread` */
	LP_CALL,   /* lp_call_body, data for the scratch area */
	LP_GIVE,   /* lp_give: a slot becomes a descriptor of the task */
	LP_SWITCH, /* lp_place...: unmaps the restorer's memory, moves vvar and vdso */
	LP_FILL,   /* lp_fill, slots, ranges, extents: page contents */
	LP_EXIT,   /* lp_exit: the process becomes a zombie */
	LP_REAP,   /* lp_reap: kills a helper, for which `thread` waits */
	LP_DRAIN,  /* no body: discards signals pending from the construction */
	LP_REGS,   /* lp_regs, components of the xsave area: the last op of a thread */
	/* The daemon. */
	LP_UFFD,     /* lp_uffd, ranges */
	LP_ANNOUNCE, /* lp_announce: reports a zombie */
	LP_FINISH,   /* no body */
	/* All. */
	LP_GO,	 /* no body: lets all tasks run */
	LP_WAIT, /* no body: waits for the process `thread` and exits with its status */
};

struct lp_open {
	uint32_t slot;
	uint32_t flags;	   /* O_* */
	uint64_t position; /* 0: do not seek */
};

struct lp_pipe {
	uint32_t reader, writer; /* slots */
	uint64_t capacity;	 /* bytes, 0: the default */
};

/* A new open file description of the file in another slot. */
struct lp_reopen {
	uint32_t slot, from;
	uint32_t flags, unused; /* O_* */
};

/* Shared anonymous memory: a slot that tasks map, and that LP_FILL fills. */
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
	uint32_t parent; /* thread that calls clone3; LP_NONE: the restorer */
	int32_t tid;
	uint64_t flags; /* CLONE_* */
};

/* An error of the call is an error; with `exact` the result must be `result`. */
struct lp_call_body {
	uint64_t nr;
	uint64_t args[6]; /* pointers: data is at plan.scratch + LP_SCRATCH_CODE */
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

/* Which extents LP_FILL reads in a range: eager ones, lazy ones. */
#define LP_TAKE_EAGER 1
#define LP_TAKE_LAZY 2

struct lp_fill_range {
	uint64_t start, end;
	uint64_t take;
};

/*
 * Extents and ranges are sorted.  The memory is the task's, or (LP_NONE) that of the LP_SHARED slot `shared`, with
 * addresses from 0 on.  The task's descriptor 0 is used meanwhile.
 */
struct lp_fill {
	uint32_t shared;
	uint32_t nr_levels; /* uint32_t slots follow, padded to 8; LP_NONE: no pages file */
	uint64_t nr_ranges; /* struct lp_fill_range follow */
	uint64_t nr_extents; /* struct lp_extent follow */
};

struct lp_exit {
	uint32_t status, unused; /* format of wait(2) */
};

struct lp_reap {
	uint32_t helper, unused;
};

struct lp_regs {
	uint64_t gp[27]; /* struct user_regs_struct */
	uint64_t blocked;
	uint64_t stop; /* 1: leave the process in a job-control stop */
	uint64_t xstate_bv;
	uint8_t fxsave[512];
	/* struct lp_component follow, each followed by its bytes, padded to 8 */
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
