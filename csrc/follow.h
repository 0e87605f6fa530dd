/*
 * Which CPU to serve from.  The thread that faults sleeps until it is answered, so its CPU is free, and an answer from
 * there costs two context switches; an answer from another CPU costs two wake-ups of an idle one, several times as much
 * (shared/design.md, section 2).  CRIU does not ask for thread ids in fault messages, so the CPU is looked up in /proc
 * now and then.
 */
#ifndef LAZYPAGES_FOLLOW_H
#define LAZYPAGES_FOLLOW_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct lp_follow {
	cpu_set_t home;	      /* where the thread may run when it follows nobody */
	bool able;	      /* there is more than one CPU to choose from */
	_Atomic int cpu;      /* the one that is followed; -1: none */
	int seen;	      /* the one of the last look; -1: none that says anything */
	uint64_t next_look;   /* CLOCK_MONOTONIC, ns */
};

/* To be called by the serving thread. */
void lp_follow_init(struct lp_follow *follow);
/* A fault of the process pid (0: not known) was read at `now`. */
void lp_follow_fault(struct lp_follow *follow, pid_t pid, uint64_t now);
/* Back to all CPUs. */
void lp_follow_nobody(struct lp_follow *follow);

/*
 * For a thread that works in the background: away from the CPU that is followed, and last in line.  lp_aside_end puts it back.
 */
struct lp_aside {
	cpu_set_t home;
	int nice;
	bool moved;
};
void lp_aside_begin(struct lp_aside *aside, const struct lp_follow *follow);
void lp_aside_end(const struct lp_aside *aside);

#endif
