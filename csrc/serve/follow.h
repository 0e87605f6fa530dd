/*
 * Which CPU to serve from, and how to stay there.  The thread that faults sleeps until it is answered, so its CPU is free,
 * and an answer from there costs two context switches; an answer from another CPU costs two wake-ups of an idle one, several
 * times as much.  CRIU does not ask for thread ids in fault messages, so the CPU is looked up
 * in /proc now and then.
 *
 * Pinning is not enough: the woken thread finds its CPU busy (with us), and select_idle_sibling() (kernel/sched/fair.c) moves it
 * to an idle one (seen with perf sched: at every first answer after we had moved).  But a CPU that runs nothing beside SCHED_IDLE
 * counts as idle.  So the serving thread is SCHED_IDLE while it wakes the only thread that waits: that thread takes its CPU back at
 * once, and we go on there when it sleeps in the next fault.  Other threads that want this CPU could then keep us from it for long:
 * a watcher thread ends that state when we make no progress in it.
 */
#ifndef LAZYPAGES_FOLLOW_H
#define LAZYPAGES_FOLLOW_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct lp_follow {
	cpu_set_t home;	      /* where the thread may run when it follows no task */
	bool able;	      /* there is more than one CPU to choose from */
	_Atomic int cpu;      /* the one that is followed; -1: none */
	uint64_t next_look, interval, moved; /* CLOCK_MONOTONIC and durations, ns */
	int tries; /* moves that came soon after the one before */
	uint64_t looked;
	pid_t last_pid;	      /* of the last fault */
	pid_t pid;	      /* of the process that stat_fd is about */
	int stat_fd;
	/* giving way */
	pid_t tid;
	pthread_t watcher;
	bool watched;	      /* the watcher runs: giving way is possible */
	_Atomic bool yields, stop, rescued;
	_Atomic uint32_t progress;
	_Atomic uint32_t asleep; /* the watcher is; a futex */
	uint64_t not_before, penalty;
	_Atomic uint32_t places; /* of threads that work in the background, a bit each */
};

/* To be called by the serving thread, first and last. */
void lp_follow_init(struct lp_follow *follow);
void lp_follow_end(struct lp_follow *follow);
/* A fault of the process pid (0: not known) was read at `now`, one of so many that were there at once. */
void lp_follow_fault(struct lp_follow *follow, pid_t pid, uint64_t now, int at_once);
/* The answer that comes next wakes the only thread that is known to wait; `now` is of its fault. */
void lp_follow_yield(struct lp_follow *follow, uint64_t now);
/* There is more to do than that, or nothing. */
void lp_follow_insist(struct lp_follow *follow);
/* Back to all CPUs. */
void lp_follow_none(struct lp_follow *follow);

/*
 * For threads that work in the background: last in line, and away from the CPU that is followed while there are faults.  Then
 * no more of them at a time than there are other CPUs.
 */
struct lp_aside {
	cpu_set_t home;
	bool batch;
	int nice, cpu; /* away from this one; -1: from none */
	uint32_t place;
};
void lp_aside_begin(struct lp_aside *aside, struct lp_follow *follow);
/* To be called now and then.  False when there is no place to work at the moment. */
bool lp_aside_look(struct lp_aside *aside, const struct lp_follow *follow, bool faults);
void lp_aside_end(const struct lp_aside *aside, struct lp_follow *follow);

#endif
