/*
 * Operations on tasks under construction: such a task is stopped, traced, has all
 * signals blocked, and runs system calls from its scratch area.
 *
 * Every function returns 0 or -errno; -EPROTO: a result other than the plan expects.
 */
#ifndef LAZYPAGES_RESTORE_TASK_H
#define LAZYPAGES_RESTORE_TASK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include "restore_plan.h"

/* Mappings that the kernel adds to every process, in ascending order: vvar (one or more) and vdso. */
#define LP_MAX_SPECIAL 8

struct lp_thread {
	pid_t tid;	 /* 0: not created yet, or exited */
	uint32_t leader; /* index of the process's leader */
	bool helper;
	bool stop; /* leave it in a job-control stop */
	struct user_regs_struct base;
};

struct lp_restorer {
	struct lp_plan plan;
	struct lp_thread *threads;
	int *slots;	   /* descriptors, -1: none */
	void **shared;	   /* mappings of LP_SHARED slots */
	uint64_t *sizes;   /* of these mappings, bytes */
	struct lp_place special[LP_MAX_SPECIAL];
	uint32_t nr_special;
	uint64_t uffd_features;
};

/* Creates the scratch area and everything else that all tasks inherit. */
int lp_prepare(struct lp_restorer *r);

int lp_spawn(struct lp_restorer *r, uint32_t index, const struct lp_spawn *spawn);

/* Runs one system call; *ret is its result. */
int lp_run(struct lp_restorer *r, uint32_t index, long nr, const uint64_t args[6], long *ret);
/* The same, but returns an error of the system call. */
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
