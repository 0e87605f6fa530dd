/*
 * The engine's own types.  Only the engine's rooms include this; its owner knows csrc/serve/engine.h.
 *
 * Threads: the serving thread is in lp_engine_run.  The owner's threads call all else, some of them lp_task_transfer (the
 * background).  Which thread may use a field, and which lock guards it:
 *
 *   struct lp_task
 *     constant once the task is linked     engine, space (the pointer), remote, is_child, total, pid, pidfd, tag, number,
 *                                          nr_levels, levels
 *     lock (shared to read, alone to       uffd, what is in space, unsure, changes, nr_changes, cap_changes, fork, reported,
 *     write)                               changes_layout, late, late_until, layout
 *     lock (alone)                         unreported_lost
 *     the serving thread only              faults, deferred, deferred_most, to_wake, sweep, batching, claims_released, readahead,
 *                                          look, next_retry, awaits_retry, read_error, next_try, pause, channel_cursor,
 *                                          lead, lead_set
 *     engine->lock                         closed, unposted, unposted_error, next, next_of_family, next_closed
 *     waiting_lock                         waiting, nr_waiting, cap_waiting
 *     the thread that has set released     next_released
 *     atomic                               all that is declared so: flags that are set once, counters, times, cursor
 *   A child that has not been linked is used by one thread: the one that has its parent's lock alone.
 *
 *   struct lp_engine
 *     constant while lp_engine_run runs    epfd, wakefd, eventfd, unreadable, guard, trace
 *     the serving thread only              channels (but for what csrc/serve/channel_requests.h says), family, cap_family, ready, cold,
 *                                          read_buffer, retries, retry_soon, retry_ns, follow (but for follow.cpu)
 *     guarded.lock                         guarded
 *     lock                                 tasks, closed, families, events, nr_events, cap_events, any_unposted
 *     atomic                               stop, rounds, last_fault, last_single, released, nr_memories
 *
 * Order of locks: a task's lock, then its waiting_lock, then engine->lock.  Of two tasks, a parent's before its child's.
 */
#ifndef LAZYPAGES_SERVING_H
#define LAZYPAGES_SERVING_H

#include <pthread.h>
#include <stdatomic.h>

#include "address_space.h"
#include "channels.h"
#include "cold.h"
#include "engine.h"
#include "faults.h"
#include "follow.h"
#include "guarded.h"
#include "lock.h"
#include "ranges.h"
#include "readahead.h"
#include "uffd_ops.h"

#define LP_READ_PAGES 128u /* of the serving thread's buffer: as many as readahead brings at once */

typedef _Atomic uint64_t lp_counter;

/* A thread that waits for a page from a remote source, dumped at dump_addr; what its fault has asked for, and where that is. */
struct lp_waiter {
	uint64_t dump_addr, since, addr, nr_pages;
};

/* A child whose layout was changing already when it was asked. */
struct lp_new_child {
	struct lp_task *task; /* not linked: the owner does not know it */
	struct lp_counts dropped;
	struct lp_run lost; /* the first run that is */
	uint64_t until;	       /* then it is waited for no longer, ns */
	bool asked;
};

/* What has been reported together with a fork: some of it may have happened before the fork and some since. */
struct lp_fork {
	struct lp_space *before; /* NULL: nothing has */
	struct lp_change *made;
	size_t nr_made;
	bool tangled; /* of the child that was made last */
	struct lp_new_child *child; /* its fork is the first of the changes that are left; until it is made nothing is read */
};

struct lp_task {
	struct lp_engine *engine;
	struct lp_space *space;
	struct lp_lock lock;
	int uffd; /* -1 once closed */
	bool closed; /* by its owner: no event is about it any more */
	bool remote, is_child;
	/*
	 * Where it is not known what left first (csrc/serve/late.h), or in a child that was forked while what had been reported
	 * was tangled (csrc/serve/doubt.h): what is there that the space does not know, and what moves from there, need not be zero.
	 */
	struct lp_ranges unsure;
	struct lp_run *unreported_lost; /* the first run that is lost, while the owner does not know the task yet; then NULL */
	_Atomic bool gone, complete;
	_Atomic bool has_guards; /* one was seen */
	_Atomic bool unseen;	 /* its guards can't be looked for, and that is reported */
	_Atomic bool broken;	 /* what it misses is not known any more */
	uint32_t unposted;	 /* events that there was no memory for, a bit for each kind */
	int32_t unposted_error;	 /* of the last of them */
	struct lp_change *changes; /* of the layout, not made in the space yet: no fault may be answered */
	size_t nr_changes, cap_changes;
	struct lp_fork fork;	 /* empty, but for a fork that has to wait */
	uint64_t reported;	 /* events that were not faults */
	bool changes_layout;	 /* such an event was read: from then on each is read alone, so that no thread gets ahead */
	struct lp_range late;	 /* left by a thread that has not reported it (csrc/serve/late.h); nothing is read before it has, */
	uint64_t late_until;	 /* or before this time, ns; 0: no thread is late */
	struct lp_faults faults; /* to be answered */
	struct lp_faults deferred; /* on pages that the background had claimed */
	size_t deferred_most;	   /* with more it is looked which of them still wait */
	lp_counter nr_deferred;	   /* ever */
	struct lp_range to_wake;   /* pages that have come without a wake-up */
	uint64_t sweep;		   /* where the next batch begins */
	bool batching;		   /* answers don't wake */
	bool claims_released;	   /* by the background, since deferred faults were looked at */
	struct lp_readahead readahead;
	struct lp_look look;
	struct lp_task *next_retry; /* in engine->retries */
	bool awaits_retry;
	uint64_t layout;     /* how often it has changed */
	int read_error;	     /* while the uffd can't be read */
	uint64_t next_try;   /* then, and while the layout does not become quiescent: not before, unless there is more to read */
	uint64_t pause;	     /* before that, ns */
	_Atomic bool released; /* in engine->released */
	struct lp_task *next_released, *next, *next_closed, *next_of_family;
	_Atomic uint64_t cursor;      /* where the background looks for its next stripe */
	_Atomic uint32_t nr_leads;    /* how often a fault has sent the background ahead */
	uint64_t lead, lead_set;      /* how far, bytes; and when, ns */
	_Atomic uint64_t last_change; /* when a layout event was read, ns */
	_Atomic uint64_t last_crowd;  /* when there were many faults at once, ns */
	_Atomic bool occupied;	      /* while the layout changes: by the one thread of the background */
	uint64_t channel_cursor;      /* where channels look for what to ask for in the background */
	pthread_mutex_t waiting_lock;
	struct lp_waiter *waiting;
	size_t nr_waiting, cap_waiting;
	uint64_t total; /* pages pending at the start */
	pid_t pid;	/* 0: not known */
	int pidfd;	/* the owner's; -1 */
	uint64_t tag;
	uint32_t number; /* of this memory, in traces */
	uint32_t nr_levels;
	struct lp_level *levels;
	lp_counter *copied, *dropped, *served; /* by source: levels, remote, lost */
	struct {
		lp_counter faults, faults_zero, faults_served, retried, zero_pages, present, copies, reads, wakes;
		lp_counter poisoned, forks, remaps, removes, unmaps, service_max;
	} stats;
	_Atomic uint32_t histogram[LP_HISTOGRAM_BUCKETS];
};

#define LP_FAMILIES 1024

struct lp_engine {
	struct lp_channels channels;
	struct lp_guarded guarded;
	struct lp_task **family; /* room to collect a fork family in */
	size_t cap_family;
	int epfd, wakefd, eventfd;
	void *unreadable;	/* a page, for probes */
	struct lp_guard *guard; /* may be NULL */
	_Atomic bool stop;
	_Atomic uint64_t rounds; /* of lp_engine_run */
	_Atomic uint64_t last_fault, last_single; /* ns; single: readahead brings nothing beside its page */
	int ready; /* uffds and channels that the last epoll_wait has named */
	struct lp_follow follow;
	struct lp_cold cold;
	char *read_buffer; /* LP_READ_PAGES pages */
	struct lp_task *retries; /* tasks with faults that could not be answered yet */
	bool retry_soon;	 /* some of these wait for a layout that is changing */
	uint64_t retry_ns;	 /* until those are tried again */
	struct lp_task *_Atomic released; /* tasks whose background has given claims back */
	struct lp_trace *trace;		  /* NULL: none */
	_Atomic uint32_t nr_memories;
	pthread_mutex_t lock;
	struct lp_task *tasks, *closed;
	struct lp_task *families[LP_FAMILIES]; /* by tag: hash table */
	struct lp_event *events;
	size_t nr_events, cap_events;
	bool any_unposted; /* of any task */
};

static inline void lp_count(lp_counter *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* (lock held) */
static inline bool lp_is_served(const struct lp_task *t)
{
	return t->uffd >= 0 && !atomic_load(&t->broken);
}

/* As lp_uffd_probe.  (lock held) */
static inline enum lp_outcome lp_probe_page(const struct lp_task *t, uint64_t addr)
{
	return lp_uffd_probe(t->uffd, t->engine->unreadable, addr);
}

/*
 * Whether what has just been seen of the task's page tables is of the layout that the space knows (lock held).  The kernel counts
 * a change from before it is made until its event has been read, and a little longer (fs/userfaultfd.c, mmap_changing).
 */
static inline bool lp_is_quiescent(const struct lp_task *t)
{
	return lp_probe_page(t, LP_ANYWHERE) != LP_CHANGING;
}

#endif
