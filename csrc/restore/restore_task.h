/*
 * What the restorer does to tasks under construction: all of it is stopped, traced, has every
 * signal blocked, and runs system calls from its scratch area.
 *
 * Every function returns 0 or -errno; -EPROTO: a result that the plan did not expect.
 */
#ifndef LAZYPAGES_RESTORE_TASK_H
#define LAZYPAGES_RESTORE_TASK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include "restore_plan.h"

/* What the kernel maps into every process, lowest first: vvar (one or more) and vdso. */
#define LP_MAX_SPECIAL 8

struct lp_thread {
	pid_t tid;	 /* 0: not made, or gone */
	uint32_t leader; /* index of the process's leader */
	bool helper;
	bool stop; /* to be left in job-control stop */
	struct user_regs_struct base;
};

struct lp_restorer {
	struct lp_plan plan;
	struct lp_thread *threads;
	int *slots;	   /* descriptors, -1: none */
	void **shared;	   /* where LP_SHARED slots are mapped */
	uint64_t *sizes;   /* and how long */
	struct lp_place special[LP_MAX_SPECIAL];
	uint32_t nr_special;
	uint64_t uffd_features;
};

/* The scratch area, and what else is inherited by all tasks. */
int lp_prepare(struct lp_restorer *r);

int lp_spawn(struct lp_restorer *r, uint32_t index, const struct lp_spawn *spawn);

/* One system call; *ret is its result. */
int lp_run(struct lp_restorer *r, uint32_t index, long nr, const uint64_t args[6], long *ret);
/* The same, with an error of the call as its own. */
int lp_must(struct lp_restorer *r, uint32_t index, long nr, const uint64_t args[6], long *ret);

int lp_do_call(struct lp_restorer *r, uint32_t index, const struct lp_call_body *call, const void *data, size_t size);
int lp_do_give(struct lp_restorer *r, uint32_t index, const struct lp_give *give);
int lp_do_switch(struct lp_restorer *r, uint32_t index, const struct lp_place *places, uint32_t count);
int lp_do_fill(struct lp_restorer *r, uint32_t index, const struct lp_fill *fill);
int lp_do_exit(struct lp_restorer *r, uint32_t index, int status);
int lp_do_reap(struct lp_restorer *r, uint32_t index, uint32_t helper);
int lp_do_drain(struct lp_restorer *r, uint32_t index);
int lp_do_regs(struct lp_restorer *r, uint32_t index, const struct lp_regs *regs, size_t size);

#endif
