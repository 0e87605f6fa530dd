#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "doubt.h"
#include "faults.h"
#include "follow.h"
#include "guard.h"
#include "guarded.h"
#include "channel.h"
#include "lock.h"
#include "old_length.h"
#include "common/pages_file.h"
#include "readahead.h"
#include "common/probe.h"
#include "smaps.h"
#include "trace.h"

/* Linux 6.6; older headers don't have it. */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

/* Linux 5.14; older headers don't have it, and an older kernel says EINVAL. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define NS 1000000000ull
#define EVENTS 64	      /* uffds answered for one epoll_wait */
#define MESSAGES 128	      /* uffd messages taken by one read */
#define EXPECTED_NS 300000 /* how long an answer of a page server is waited for with our CPU left to others */
/*
 * Until answers that were put off are tried again.  The thread that changes the layout needs a CPU first, which takes some us;
 * or it is stopped, and then this takes as long as that.
 */
#define RETRY_FIRST_NS 20000
#define RETRY_MOST_NS 1000000
#define READ_RETRY_NS (10 * NS / 1000) /* until a uffd that could not be read is read again */
#define IDLE_MS 50	      /* without a fault: then no task's CPU is followed */
#define CHUNK_QUIET (512u << 10) /* bytes a background copy takes at a time */
#define CHUNK_BUSY (64u << 10)	 /* the same while tasks fault: one waits for this at most */
#define CHUNK_LONE (8u << 10)	 /* and while they fault here and there, where one fault brings one page */
#define BUSY_NS (2 * NS / 1000)	 /* how long after a fault tasks count as faulting */
/* What one thread of the background has to itself: what one page table maps, for the lock of that is taken for each page. */
#define STRIPE ((uint64_t)2 << 20)
#define LP_NO_PAGE (~(uint64_t)0) /* an address that no page has */
#define MAPPED 8 /* levels of a chain of whose files a thread of the background remembers what it has mapped */
#define ASIDE_NS (5 * NS / 1000) /* how long after a fault the background leaves its CPU to those who fault */
#define ASIDE_TRIES 4		 /* for a place elsewhere, so far apart */
/*
 * How long after a layout event the background leaves room for the next: one thread, with pauses.  Who changes the layout takes
 * a rwsem of the uffd for writing that every copy takes for reading (map_changing_lock, Linux 6.9 and later), and one reader
 * after another keeps it from that for 4 ms (kernel/locking/rwsem.c, RWSEM_WAIT_TIMEOUT).
 */
#define CHANGING_NS (5 * NS / 1000)
#define CHANGING_PAUSE_NS 50000
#define LEAD_MIN ((uint64_t)1 << 20)
#define LEAD_MAX ((uint64_t)32 << 20)
#define LEAD_MEMORY_NS (NS / 10)
#define LOOKAHEAD_TRIES 8	 /* runs that another thread may take before we do */
#define REST_TRIES 32		 /* for a thread that has been told of and has to run before the layout is at rest: some 50 us */
#define CHILD_TRIES 1000	 /* the same for a child, which no one else will wait for; from CHILD_YIELDS on with a pause: */
#define CHILD_YIELDS 100
#define CHILD_PAUSE_NS 50000
/*
 * From so many faults at once on they are answered in the order of their addresses, and threads are woken for BATCH answers
 * together: each wake-up, that of a copy as well, goes through all threads that wait (fs/userfaultfd.c, __wake_userfault).
 */
#define CROWD 64
#define BATCH 64
#define CROWD_NS (2 * NS / 1000) /* how long after that the background does not wake without need */
#define LEFT_LOOK 64		 /* faults left to the background before it is looked which of them still are */
#define SERVE_TRIES 4		 /* for a task whose layout is changing, before others have their turn */

typedef _Atomic uint64_t counter_t;

/* A thread that waits for a page from a remote source, dumped at image; what its fault has asked for, and where that is. */
struct waiter {
	uint64_t image, since, addr, nr_pages;
};

struct ranges {
	struct lp_range *at;
	size_t nr, cap;
};

struct lp_task {
	struct lp_engine *engine;
	struct lp_space *space;
	struct lp_lock lock;
	int uffd; /* -1 once closed */
	bool closed; /* under the engine's lock: nobody is to hear of it any more */
	bool remote, is_child;
	bool closing; /* by another thread than the serving one */
	/*
	 * Of a child that was forked while what had been reported was tangled (csrc/serve/doubt.h): what is there that the space does not
	 * know, and what moves from there, need not be zero.
	 */
	struct ranges unsure;
	struct lp_answer *untold; /* the first run that is lost, while nobody knows the task yet */
	_Atomic bool gone, complete;
	_Atomic bool has_guards; /* one was seen */
	_Atomic bool unseen; /* its guards can't be looked for, and the owner has been told */
	_Atomic bool broken;	/* we don't know any more what it misses */
	uint32_t unheard;	/* notices that there was no memory for, by kind; under the engine's lock, as what follows */
	int32_t unheard_error;	/* of the last of them */
	struct lp_change *changes; /* of the layout, not made in the space yet: nothing may be answered */
	size_t nr_changes, cap_changes;
	uint64_t told; /* events that were not faults */
	struct lp_faults faults; /* to be answered; used by the serving thread only, as what follows */
	struct lp_faults left;	 /* on pages that the background had claimed */
	size_t left_look;	 /* so many of them are too many */
	counter_t times_left;	 /* how often a fault was put there */
	struct lp_range to_wake; /* pages that have come without a wake-up */
	uint64_t sweep;		 /* where the next batch begins */
	bool batching;		 /* answers don't wake */
	bool look_at_left;	 /* the background has given claims back since they were looked at */
	struct lp_readahead plan;
	struct lp_look look;
	struct lp_task *next_put_off;
	uint64_t layout; /* how often it has changed */
	bool is_put_off;
	int read_error;	     /* while the uffd can't be read */
	uint64_t next_try;   /* then, and while its layout does not come to rest: not before, unless it has more to say */
	uint64_t pause;	     /* before that, ns */
	_Atomic bool released; /* in the engine's list */
	struct lp_task *next_released, *next, *next_dead;
	_Atomic uint64_t cursor; /* where the next stripe of the background is looked for */
	_Atomic uint32_t sent;	 /* how often a fault has sent it elsewhere */
	_Atomic uint64_t last_change; /* when a layout event was read, ns */
	_Atomic uint64_t last_crowd;  /* when there were many faults at once, ns */
	_Atomic bool occupied;	 /* while there are some: by the one thread of the background */
	uint64_t channel_cursor;	 /* that of channels, the serving thread's */
	struct lp_task *next_kin; /* under the engine's lock */
	pthread_mutex_t waiting_lock; /* of what follows */
	struct waiter *waiting;
	_Atomic size_t nr_waiting; /* read without the lock, too */
	size_t cap_waiting;
	uint64_t lead, led_at;	 /* how far the background was sent ahead of a thread, and when; bytes, ns */
	uint64_t total;
	pid_t pid; /* 0: not known */
	int pidfd; /* the owner's; -1 */
	uint64_t tag;
	uint32_t number; /* of this memory, in traces */
	uint32_t nr_levels;
	struct lp_level *levels;
	counter_t *copied, *dropped, *served; /* by source: levels, remote, lost */
	struct {
		counter_t faults, faults_zero, faults_served, retried, zero_pages, present, copies, reads, wakes;
		counter_t poisoned, forks, remaps, removes, unmaps, service_max;
	} stats;
	_Atomic uint32_t histogram[LP_HISTOGRAM_BUCKETS];
};

#define FAMILIES 1024

struct seen;

struct lp_memory {
	struct lp_space *space;
	struct lp_level *levels;
	uint32_t nr_levels;
	bool remote;
};

struct lp_engine {
	struct lp_channels channels;
	struct lp_guarded guarded;
	struct lp_task **kin; /* for the serving thread to collect a family in */
	size_t cap_kin;
	int epfd, wakefd, noticefd;
	void *nowhere; /* a page that can't be read */
	struct lp_guard *guard; /* may be NULL */
	_Atomic bool stop, running;
	_Atomic uint64_t last_fault, last_lone; /* when; of those that continue nothing */
	int ready; /* tasks that have something to say, of those that the last look at all of them has shown */
	struct lp_follow follow; /* the serving thread's; which CPU it is at, anyone may read */
	struct lp_task *put_off; /* tasks with answers put off; the serving thread's */
	bool soon;		 /* some of these wait for a layout that is changing; likewise */
	uint64_t retry;		 /* ns until those are tried again; likewise */
	struct lp_task *_Atomic released; /* whose background has given claims back */
	struct lp_trace *trace;	 /* NULL: none */
	_Atomic uint32_t nr_memories;
	pthread_mutex_t lock;	 /* of what follows */
	struct lp_task *tasks, *dead;
	struct lp_task *families[FAMILIES]; /* by tag */
	struct lp_notice *notices;
	size_t nr_notices, cap_notices;
	bool unheard;		 /* any task has some */
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * NS + (uint64_t)ts.tv_nsec;
}

static void add(counter_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;
	ssize_t rc = write(fd, &one, sizeof(one)); /* fails only when it is signalled 2^64-2 times already */

	(void)rc;
}

static void clear_fd(int fd)
{
	uint64_t count;
	ssize_t rc = read(fd, &count, sizeof(count));

	(void)rc;
}

/* ---- tracing ---- */

static uint16_t trace_source(uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return LP_TRACE_REMOTE;
	return source == LP_SOURCE_LOST ? LP_TRACE_NOWHERE : (uint16_t)source;
}

static void trace_at(const struct lp_task *t, uint64_t time, enum lp_trace_kind kind, uint16_t source, uint64_t addr,
		     uint64_t pages, uint64_t detail)
{
	lp_trace_put(t->engine->trace, &(struct lp_trace_record){
					       .time = time,
					       .addr = addr,
					       .pages = pages,
					       .detail = detail,
					       .task = (uint32_t)t->tag,
					       .memory = t->number,
					       .kind = kind,
					       .source = source,
				       });
}

/* Now, if anybody wants to know. */
static void trace(const struct lp_task *t, enum lp_trace_kind kind, uint16_t source, uint64_t addr, uint64_t pages,
		  uint64_t detail)
{
	if (t->engine->trace)
		trace_at(t, now_ns(), kind, source, addr, pages, detail);
}

/* What began at `begun` and is done now; 0: nobody wants to know. */
static void trace_took(const struct lp_task *t, uint64_t begun, enum lp_trace_kind kind, uint16_t source, uint64_t addr,
		       uint64_t pages)
{
	uint64_t now = begun ? now_ns() : 0;

	if (begun)
		trace_at(t, now, kind, source, addr, pages, now - begun);
}

static uint64_t trace_begins(const struct lp_task *t)
{
	return t->engine->trace ? now_ns() : 0;
}

/* ---- notices ---- */

static bool more_notices(struct lp_engine *e)
{
	size_t cap = e->cap_notices ? e->cap_notices * 2 : 64;
	struct lp_notice *more = realloc(e->notices, cap * sizeof(*more));

	if (!more)
		return false;
	e->notices = more;
	e->cap_notices = cap;
	return true;
}

/*
 * A notice that there is no memory for.  Those that come once for a task are kept as a bit.  Of pages that are lost nobody
 * would ever hear: then the task must not go on.  Only a want can be told again: false.
 */
static bool notify_without_memory(struct lp_engine *e, const struct lp_notice *notice)
{
	uint32_t kind = notice->kind;

	if (kind == LP_NOTICE_NEED || kind == LP_NOTICE_HURRY)
		return false;
	if (kind == LP_NOTICE_LOST) {
		kind = LP_NOTICE_BROKEN;
		atomic_store(&notice->task->broken, true);
	}
	notice->task->unheard |= 1u << kind;
	notice->task->unheard_error = kind == notice->kind ? notice->error : ENOMEM;
	e->unheard = true;
	return true;
}

/* False: there was no memory, and it has to be tried again. */
static bool notify(struct lp_engine *e, struct lp_notice notice)
{
	struct lp_notice *last;
	bool done = true;

	pthread_mutex_lock(&e->lock);
	if (notice.task->closed)
		goto out;
	last = e->nr_notices ? &e->notices[e->nr_notices - 1] : NULL;
	if (last && notice.kind == LP_NOTICE_LOST && last->kind == notice.kind && last->task == notice.task &&
	    last->error == notice.error && last->image + (last->nr_pages << LP_PAGE_SHIFT) == notice.image &&
	    last->addr + (last->nr_pages << LP_PAGE_SHIFT) == notice.addr) {
		last->nr_pages += notice.nr_pages;
		goto out;
	}
	if (e->nr_notices == e->cap_notices && !more_notices(e))
		done = notify_without_memory(e, &notice);
	else
		e->notices[e->nr_notices++] = notice;
out:
	pthread_mutex_unlock(&e->lock);
	signal_fd(e->noticefd);
	return done;
}

/* The notices, of one kind or all, that are kept as bits; returns how many. (lock held) */
static size_t take_unheard(struct lp_engine *e, uint32_t kinds, struct lp_notice *notices, size_t max)
{
	size_t nr = 0;

	for (struct lp_task *t = e->tasks; t; t = t->next)
		for (uint32_t kind = LP_NOTICE_FORKED; t->unheard && kind <= LP_NOTICE_BROKEN && nr < max; kind++)
			if (t->unheard & kinds & 1u << kind) {
				t->unheard &= ~(1u << kind);
				notices[nr++] = (struct lp_notice){.kind = kind, .error = t->unheard_error, .task = t};
			}
	return nr;
}

size_t lp_engine_notices(struct lp_engine *e, struct lp_notice *notices, size_t max)
{
	size_t nr, first = 0;

	pthread_mutex_lock(&e->lock);
	clear_fd(e->noticefd);
	/* a task is heard of before anything about it is; all other bits come last in its life */
	if (e->unheard)
		first = take_unheard(e, 1u << LP_NOTICE_FORKED, notices, max);
	nr = e->nr_notices < max - first ? e->nr_notices : max - first;
	if (nr) {
		memcpy(notices + first, e->notices, nr * sizeof(*notices));
		memmove(e->notices, e->notices + nr, (e->nr_notices - nr) * sizeof(*notices));
		e->nr_notices -= nr;
	}
	nr += first;
	if (e->unheard && !e->nr_notices) {
		nr += take_unheard(e, ~0u, notices + nr, max - nr);
		e->unheard = nr == max; /* there may be more */
	}
	if (e->nr_notices || e->unheard)
		signal_fd(e->noticefd);
	pthread_mutex_unlock(&e->lock);
	return nr;
}

static void notify_task(struct lp_task *t, uint32_t kind, int error)
{
	notify(t->engine, (struct lp_notice){.kind = kind, .error = error, .task = t});
}

static void is_gone(struct lp_task *t)
{
	if (atomic_exchange(&t->gone, true))
		return;
	trace(t, LP_TRACE_GONE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	notify_task(t, LP_NOTICE_GONE, 0);
}

/*
 * What the task misses is not known any more: from here on nothing is answered, and the owner kills it.  Its uffd, and those of
 * children that it has forked and nobody serves, stay open: closed they would be filled with zeros.
 */
static void break_task(struct lp_task *t, int error)
{
	if (!atomic_exchange(&t->broken, true))
		notify_task(t, LP_NOTICE_BROKEN, error);
}

static bool is_served(const struct lp_task *t)
{
	return t->uffd >= 0 && !atomic_load(&t->broken);
}

/* (the task's lock is held: else its uffd could be closed at this moment, and its number be another's) */
static void check_complete(struct lp_task *t)
{
	if (lp_space_pending(t->space) || atomic_load(&t->broken) || atomic_exchange(&t->complete, true))
		return;
	lp_guard_complete(t->engine->guard, t->uffd);
	trace(t, LP_TRACE_COMPLETE, LP_TRACE_NO_SOURCE, 0, 0, 0);
	notify_task(t, LP_NOTICE_COMPLETE, 0);
}

/* ---- measuring ---- */

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t exponent, bucket;

	if (ns < 8)
		return (uint32_t)ns;
	exponent = 63 - (uint32_t)__builtin_clzll(ns);
	bucket = (exponent - 2) * 8 + ((ns >> (exponent - 3)) & 7);
	return bucket < LP_HISTOGRAM_BUCKETS ? bucket : LP_HISTOGRAM_BUCKETS - 1;
}

uint64_t lp_histogram_bound(uint32_t bucket)
{
	uint32_t exponent = bucket / 8 + 2;

	if (bucket < 8)
		return bucket;
	return ((8 + (uint64_t)(bucket % 8) + 1) << (exponent - 3)) - 1;
}

/* Faults on one of the pages at addr, of which the first was read at `since`. */
static void answered(struct lp_task *t, uint64_t since, uint32_t times, uint16_t source, uint64_t addr, uint64_t pages)
{
	uint64_t now = now_ns(), ns = now - since, max = atomic_load(&t->stats.service_max);

	if (t->engine->trace)
		trace_at(t, now, LP_TRACE_ANSWERED, source, addr, pages, ns);
	atomic_fetch_add_explicit(&t->histogram[bucket_of(ns)], times, memory_order_relaxed);
	while (ns > max && !atomic_compare_exchange_weak(&t->stats.service_max, &max, ns))
		;
}

static uint32_t source_index(const struct lp_task *t, uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return t->nr_levels;
	return source == LP_SOURCE_LOST ? t->nr_levels + 1 : source;
}

static void begin_wait(struct lp_task *t, struct waiter waiter)
{
	pthread_mutex_lock(&t->waiting_lock);
	if (t->nr_waiting == t->cap_waiting) {
		size_t cap = t->cap_waiting ? t->cap_waiting * 2 : 16;
		struct waiter *more = realloc(t->waiting, cap * sizeof(*more));

		if (!more) { /* only for the statistics */
			pthread_mutex_unlock(&t->waiting_lock);
			return;
		}
		t->waiting = more;
		t->cap_waiting = cap;
	}
	t->waiting[t->nr_waiting++] = waiter;
	pthread_mutex_unlock(&t->waiting_lock);
}

/* Pages have come from a remote source (or never will): whoever waited for one does not any more. */
static void end_wait(struct lp_task *t, uint64_t image, uint64_t end, bool served)
{
	pthread_mutex_lock(&t->waiting_lock);
	for (size_t i = 0; i < t->nr_waiting;) {
		struct waiter w = t->waiting[i];

		if (w.image < image || w.image >= end) {
			i++;
			continue;
		}
		t->waiting[i] = t->waiting[--t->nr_waiting];
		if (served) {
			add(&t->stats.faults_served, 1);
			add(&t->served[t->nr_levels], 1);
			answered(t, w.since, 1, LP_TRACE_REMOTE, w.addr, w.nr_pages);
		}
	}
	pthread_mutex_unlock(&t->waiting_lock);
}

/* ---- the ioctls ---- */

static void wake(struct lp_task *t, uint64_t addr, uint64_t nr_pages)
{
	struct uffdio_range range = {.start = addr, .len = nr_pages << LP_PAGE_SHIFT};

	add(&t->stats.wakes, 1);
	/* no error matters: who can't be woken does not wait there */
	ioctl(t->uffd, UFFDIO_WAKE, &range);
}

/* Who waits for these pages, which are there, is woken: now or with the batch. (serving thread) */
static void wake_soon(struct lp_task *t, uint64_t addr, uint64_t nr_pages)
{
	uint64_t end = addr + (nr_pages << LP_PAGE_SHIFT);

	if (!t->batching) {
		wake(t, addr, nr_pages);
		return;
	}
	if (t->to_wake.start == t->to_wake.end)
		t->to_wake = (struct lp_range){addr, end};
	if (addr < t->to_wake.start)
		t->to_wake.start = addr;
	if (end > t->to_wake.end)
		t->to_wake.end = end;
}

static void wake_batch(struct lp_task *t)
{
	if (t->to_wake.start < t->to_wake.end)
		wake(t, t->to_wake.start, (t->to_wake.end - t->to_wake.start) >> LP_PAGE_SHIFT);
	t->to_wake = (struct lp_range){0};
}

static int try_page(struct lp_task *t, uint64_t addr)
{
	return lp_probe(t->uffd, t->engine->nowhere, addr);
}

static void notify_lost(struct lp_task *t, const struct lp_answer *run, uint64_t skip, uint64_t nr, int error)
{
	trace(t, LP_TRACE_LOST, trace_source(run->source), run->addr + (skip << LP_PAGE_SHIFT), nr, (uint64_t)error);
	notify(t->engine, (struct lp_notice){
				  .kind = LP_NOTICE_LOST,
				  .error = error,
				  .task = t,
				  .image = run->image + (skip << LP_PAGE_SHIFT),
				  .addr = run->addr + (skip << LP_PAGE_SHIFT),
				  .nr_pages = nr,
			  });
}

static void lose(struct lp_task *t, const struct lp_answer *run, uint64_t skip, uint64_t nr, int error)
{
	lp_space_lose(t->space, run->dense + skip, nr);
	notify_lost(t, run, skip, nr, error);
}

/* Counters that a layout event drops pages into, and their way into the task's. */
static void drop_into(struct lp_task *t, const uint64_t *dropped)
{
	for (uint32_t i = 0; i < t->nr_levels + 2; i++)
		add(&t->dropped[i], dropped[i]);
}

static void drop_pages(struct lp_task *t, const struct lp_answer *run, uint64_t skip, uint64_t nr)
{
	add(&t->dropped[source_index(t, run->source)], lp_space_commit(t->space, run->dense + skip, nr));
}

/* What becomes of the claims on pages that can't be copied now. */
enum claims {
	KEEP_CLAIMS,	/* the caller tries again */
	RELEASE,	/* the caller is the serving thread: nobody has left a fault to it meanwhile */
	RELEASE_LEFT,	/* the serving thread may have left faults to the caller */
	RELEASE_LEFT_QUIETLY, /* likewise; and who waits for what is copied is woken by the caller */
};

/* The serving thread is to answer faults that it has left to the background.  No wake-up: all those threads would fault again. */
static void take_back(struct lp_task *t)
{
	struct lp_engine *e = t->engine;

	if (atomic_exchange(&t->released, true))
		return;
	t->next_released = atomic_load(&e->released);
	while (!atomic_compare_exchange_weak(&e->released, &t->next_released, t))
		;
	signal_fd(e->wakefd);
}

/* Claimed pages that can't be copied now, from number `skip` of the run on. */
static void settle_claims(struct lp_task *t, const struct lp_answer *run, uint64_t skip, enum claims claims)
{
	if (claims != KEEP_CLAIMS)
		lp_space_release(t->space, run->dense + skip, run->nr_pages - skip);
	if (claims == RELEASE_LEFT || claims == RELEASE_LEFT_QUIETLY)
		take_back(t);
}

/*
 * Copies a claimed run from src into the task (lock held shared).  Settles every page of it: committed, or lost, or as
 * `claims` says when it returns -EAGAIN (a layout event is under way).  0, -EAGAIN, -ESRCH.  Nobody has looked then whether
 * the task is complete.
 */
static int copy_claimed(struct lp_task *t, const struct lp_answer *run, const void *src, enum claims claims)
{
	counter_t *copied = &t->copied[source_index(t, run->source)];
	uint64_t done = 0, step = run->nr_pages;
	bool quiet = claims == RELEASE ? t->batching : claims == RELEASE_LEFT_QUIETLY;

	while (done < run->nr_pages) {
		uint64_t at = done << LP_PAGE_SHIFT, left = run->nr_pages - done;
		struct uffdio_copy copy = {
			.dst = run->addr + at,
			.src = (uintptr_t)src + at,
			.len = (step < left ? step : left) << LP_PAGE_SHIFT,
			.mode = quiet ? UFFDIO_COPY_MODE_DONTWAKE : 0,
		};
		int error = 0;

		add(&t->stats.copies, 1);
		if (ioctl(t->uffd, UFFDIO_COPY, &copy))
			error = copy.copy < 0 ? (int)-copy.copy : errno;
		if (copy.copy > 0) {
			uint64_t nr = (uint64_t)copy.copy >> LP_PAGE_SHIFT;

			add(copied, nr);
			lp_space_commit(t->space, run->dense + done, nr);
			if (quiet && claims == RELEASE)
				wake_soon(t, run->addr + at, nr);
			done += nr;
			if (!error)
				step *= 2; /* after a bisection: larger again */
			continue;
		}
		switch (error) {
		case EEXIST: /* somebody else's page is there, or a guard; a thread may wait for it all the same */
			add(&t->stats.present, 1);
			drop_pages(t, run, done, 1);
			if (claims == RELEASE)
				wake_soon(t, run->addr + at, 1);
			else
				wake(t, run->addr + at, 1);
			done++;
			continue;
		case ESRCH:
		case ENOSPC:
			is_gone(t);
			lp_space_release(t->space, run->dense + done, left);
			return -ESRCH;
		case EAGAIN: /* a layout event under way */
		case ENOMEM: /* memory may come back */
		case EINTR:
			settle_claims(t, run, done, claims);
			return -EAGAIN;
		default:
			/*
			 * ENOENT: the run is not within one registered VMA (mprotect and madvise split VMAs without an
			 * event).  EFAULT: bytes that can't be read, as past the end of a truncated file.  Halve until
			 * the page is found that can't be done.
			 */
			if (copy.len > LP_PAGE_SIZE) {
				step = (copy.len >> LP_PAGE_SHIFT) / 2;
				continue;
			}
			/* The kernel looks for the VMA before it looks whether the layout is changing. */
			if (error == ENOENT && try_page(t, run->addr + at) == EAGAIN)
				continue;
			/*
			 * A page that a forked child has not: all that its parent had was registered, so another thread unmapped
			 * it while one forked; or it is not for children (MADV_DONTFORK).
			 */
			if (error == ENOENT && t->is_child)
				drop_pages(t, run, done, 1);
			else
				lose(t, run, done, 1, error);
			done++;
		}
	}
	return 0;
}

/* The run without its first pages. */
static struct lp_answer rest_of(const struct lp_answer *run, uint64_t skip)
{
	struct lp_answer rest = *run;

	rest.addr += skip << LP_PAGE_SHIFT;
	rest.image += skip << LP_PAGE_SHIFT;
	rest.offset += skip << LP_PAGE_SHIFT;
	rest.dense += skip;
	rest.nr_pages -= skip;
	return rest;
}

static struct lp_guarded_task guarded_task(const struct lp_task *t)
{
	return (struct lp_guarded_task){
		.owner = t, .pid = t->pid, .pidfd = t->pidfd, .uffd = t->uffd, .nowhere = t->engine->nowhere};
}

/*
 * Whether what has just been seen of the task's page tables is of the layout that the space knows (lock held).  Who changes it is
 * counted from before the change until it has been read of, and a little longer (fs/userfaultfd.c, mmap_changing).
 */
static bool at_rest(struct lp_task *t)
{
	return try_page(t, LP_ANYWHERE) != EAGAIN;
}

/*
 * As copy_claimed, but for guards (csrc/serve/guarded.h): those pages are dropped, since from the moment a guard is installed what was
 * there is gone, and when it is removed they are zero.  `touched`: a page on which a thread has just faulted, so that it is no
 * guard unless another thread has made it one meanwhile; on its own it is copied without a look, unless the task has guards.
 * look: the thread's, or NULL: what it copies next is elsewhere.
 */
static int copy_unguarded(struct lp_task *t, const struct lp_answer *run, const void *src, enum claims claims, uint64_t touched,
			  struct lp_look *look)
{
	struct lp_guarded *g = &t->engine->guarded;
	struct lp_guarded_task task = guarded_task(t);
	uint64_t end = run->addr + (run->nr_pages << LP_PAGE_SHIFT), done = 0, now;
	int fd, rc = 0;

	if (!g->category || !t->pid)
		return copy_claimed(t, run, src, claims);
	if (atomic_load_explicit(&t->has_guards, memory_order_relaxed))
		look = NULL;
	else if (run->nr_pages == 1 && run->addr == touched)
		return copy_claimed(t, run, src, claims);
	now = look ? now_ns() : 0;
	if (look && look->layout == t->layout && run->addr >= look->from && end <= look->to && now - look->at < LP_LOOK_NS)
		return copy_claimed(t, run, src, claims);
	fd = lp_guarded_take(g, &task);
	if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM) {
		settle_claims(t, run, 0, claims);
		return -EAGAIN;
	}
	if (fd < 0) {
		if (fd != -ESRCH && !atomic_exchange(&t->unseen, true))
			notify_task(t, LP_NOTICE_UNSEEN, -fd);
		return copy_claimed(t, run, src, claims);
	}
	while (done < run->nr_pages && !rc) {
		struct lp_answer part = rest_of(run, done);
		bool close = atomic_load_explicit(&t->has_guards, memory_order_relaxed);
		uint64_t until = close && end - part.addr > LP_LOOK_CLOSE ? part.addr + LP_LOOK_CLOSE : end, nr;
		uint64_t ahead = look && !close && end < part.addr + LP_LOOK_AHEAD ? part.addr + LP_LOOK_AHEAD : until;
		struct lp_range guard = {until, until};

		/*
		 * Ahead may be past all that a task can have; other errors don't matter: where there are no page tables there is
		 * nothing to copy to.
		 */
		if (lp_guarded_scan(fd, g->category, part.addr, ahead, &guard) && ahead > until)
			lp_guarded_scan(fd, g->category, part.addr, until, &guard);
		if (guard.start < guard.end && !close) {
			atomic_store_explicit(&t->has_guards, true, memory_order_relaxed);
			continue; /* closer */
		}
		if (look && !close)
			*look = (struct lp_look){part.addr, guard.start, now, t->layout};
		if (guard.start > until)
			guard.start = until;
		if (guard.end > until)
			guard.end = until;
		part.nr_pages = (guard.start - part.addr) >> LP_PAGE_SHIFT;
		if (part.nr_pages)
			rc = copy_claimed(t, &part, (const char *)src + (done << LP_PAGE_SHIFT), claims);
		done += part.nr_pages;
		nr = (guard.end - guard.start) >> LP_PAGE_SHIFT;
		if (rc || !nr)
			continue;
		if (!at_rest(t)) { /* it may be the guard of what is there now */
			rc = -EAGAIN;
			continue;
		}
		drop_pages(t, run, done, nr);
		wake(t, guard.start, nr); /* who waits there: it was no guard then */
		done += nr;
	}
	lp_guarded_give(g, t, fd);
	if (rc)
		settle_claims(t, run, done, rc == -EAGAIN ? claims : RELEASE);
	return rc;
}

static int copy_run(struct lp_task *t, const struct lp_answer *run, const void *src, enum claims claims)
{
	int rc = copy_unguarded(t, run, src, claims, LP_NO_PAGE, NULL);

	check_complete(t);
	return rc;
}

/*
 * As copy_run, from the pages file that has the run.  What the file does not hold any more is lost.  If it became shorter
 * while it was read, the page that it ends in may have come with zeros: the owner is told (ESTALE), there is no taking it back.
 */
static int copy_level(struct lp_task *t, const struct lp_answer *run, enum claims claims, uint64_t touched, struct lp_look *look)
{
	const struct lp_level *level = &t->levels[run->source];
	uint64_t held = lp_pages_held(level->fd, run->offset, run->nr_pages), still;
	struct lp_answer part = *run;
	int rc = 0;

	if (held < run->nr_pages)
		lose(t, run, held, run->nr_pages - held, EFAULT);
	part.nr_pages = held;
	if (held)
		rc = copy_unguarded(t, &part, (const char *)level->base + run->offset, claims, touched, look);
	still = lp_pages_held(level->fd, run->offset, held);
	if (still < held)
		notify_lost(t, run, still, 1, ESTALE);
	check_complete(t);
	return rc;
}

/* 0, -EAGAIN, -ESRCH */
static int zero_page(struct lp_task *t, uint64_t addr)
{
	struct uffdio_zeropage zero = {
		.range = {.start = addr, .len = LP_PAGE_SIZE},
		.mode = t->batching ? UFFDIO_ZEROPAGE_MODE_DONTWAKE : 0,
	};
	int error;

	if (!ioctl(t->uffd, UFFDIO_ZEROPAGE, &zero)) {
		add(&t->stats.zero_pages, 1);
		if (t->batching)
			wake_soon(t, addr, 1);
		return 0;
	}
	error = zero.zeropage < 0 ? (int)-zero.zeropage : errno;
	if (lp_means_gone(error)) {
		is_gone(t);
		return -ESRCH;
	}
	if (error == EAGAIN || error == ENOMEM || error == EINTR)
		return -EAGAIN;
	if (error == EEXIST)
		add(&t->stats.present, 1);
	else if (error != ENOENT) /* ENOENT: unmapped since; the thread finds out when it runs */
		notify_task(t, LP_NOTICE_FAILED, error);
	wake_soon(t, addr, 1);
	return 0;
}

/* ---- faults ---- */

/* Widens a run that begins at a faulting page by what readahead says; claims it. False when another has the page. */
static bool claim_window(struct lp_task *t, struct lp_answer *run, struct lp_window window)
{
	uint64_t before = (run->addr >> LP_PAGE_SHIFT) - window.first, nr = window.nr - before;

	if (nr > 1)
		*run = lp_space_lookup(t->space, run->addr, nr);
	if (run->kind != LP_DATA && run->kind != LP_REMOTE)
		return false;
	if (before && (before = lp_space_lookback(t->space, run, before))) {
		uint64_t bytes = before << LP_PAGE_SHIFT;
		uint64_t got = lp_space_claim(t->space, run->dense - before, before + run->nr_pages);

		if (got > before) {
			run->addr -= bytes;
			run->image -= bytes;
			run->offset -= bytes;
			run->dense -= before;
			run->nr_pages = got;
			return true;
		}
		lp_space_release(t->space, run->dense - before, got);
	}
	run->nr_pages = lp_space_claim(t->space, run->dense, run->nr_pages);
	return run->nr_pages > 0;
}

/* Brings what waits in [addr, end), whatever lies between.  0, -EAGAIN, -ESRCH. */
static int bring(struct lp_task *t, uint64_t addr, uint64_t end)
{
	struct lp_answer run;
	int rc = 0;

	for (; addr < end && !rc; addr += run.nr_pages << LP_PAGE_SHIFT) {
		run = lp_space_lookup(t->space, addr, (end - addr) >> LP_PAGE_SHIFT);
		if (run.kind != LP_DATA)
			continue;
		run.nr_pages = lp_space_claim(t->space, run.dense, run.nr_pages);
		if (run.nr_pages)
			rc = copy_level(t, &run, RELEASE, LP_NO_PAGE, &t->look);
		else
			run.nr_pages = 1; /* somebody was faster */
	}
	return rc;
}

static void try_again(struct lp_task *t)
{
	if (!t->is_put_off) {
		t->is_put_off = true;
		t->next_put_off = t->engine->put_off;
		t->engine->put_off = t;
	}
}

/*
 * A thread has caught up with the background: that goes on well ahead of it, or they would meet again at every chunk.
 * What lies between is for faults and their readahead; the background comes back to what is left of it.
 */
static void lead_on(struct lp_task *t, const struct lp_fault *fault)
{
	if (fault->since - t->led_at > LEAD_MEMORY_NS)
		t->lead = LEAD_MIN;
	else if (t->lead < LEAD_MAX)
		t->lead *= 2;
	t->led_at = fault->since;
	atomic_store(&t->cursor, fault->addr + t->lead);
	atomic_fetch_add(&t->sent, 1);
}

/*
 * Faults left to the background: those on pages that it has given back are to be answered (lock held).  Whoever waits for a
 * page that has come was woken by that; and by make_change, if it went away again.
 */
static void look_at_left(struct lp_task *t)
{
	bool was_released = t->look_at_left;
	struct lp_range came = {0};

	t->look_at_left = false;
	t->left_look = LEFT_LOOK;
	for (size_t nr = t->left.nr; nr; nr--) {
		struct lp_fault fault = lp_faults_pop(&t->left);
		struct lp_answer run = lp_space_lookup(t->space, fault.addr, 1);

		/*
		 * Given back by one thread and claimed by another, which may copy without a wake-up as it knows of no fault that
		 * has been left since: as in leave_fault.
		 */
		if (was_released && run.kind == LP_CLAIMED) {
			add(&t->times_left, 1);
			atomic_thread_fence(memory_order_seq_cst);
			run = lp_space_lookup(t->space, fault.addr, 1);
		}
		if (run.kind == LP_ZERO) {
			if (came.start == came.end || fault.addr < came.start)
				came.start = fault.addr;
			if (fault.addr + LP_PAGE_SIZE > came.end)
				came.end = fault.addr + LP_PAGE_SIZE;
			continue;
		}
		if (run.kind != LP_CLAIMED) {
			if (lp_faults_push(&t->faults, fault))
				continue;
			t->look_at_left = true; /* once there is memory */
			try_again(t);
		}
		lp_faults_push(&t->left, fault); /* there is room, that of the one taken out */
	}
	if (came.start < came.end)
		wake_soon(t, came.start, (came.end - came.start) >> LP_PAGE_SHIFT);
	if (2 * t->left.nr > LEFT_LOOK)
		t->left_look = 2 * t->left.nr;
}

/* Another thread brings the page, and wakes; or it calls take_back.  0, or -EAGAIN: not now. */
static int leave_fault(struct lp_task *t, struct lp_fault fault)
{
	if (!lp_faults_push(&t->left, fault))
		return -EAGAIN;
	add(&t->times_left, 1);
	atomic_thread_fence(memory_order_seq_cst); /* with that of bring_run */
	if (lp_space_lookup(t->space, fault.addr, 1).kind == LP_ZERO)
		wake_soon(t, fault.addr, 1); /* it has come meanwhile */
	if (t->left.nr > t->left_look)
		look_at_left(t);
	return 0;
}

static bool is_unsure(const struct lp_task *t, uint64_t start, uint64_t end)
{
	for (size_t i = 0; i < t->unsure.nr; i++)
		if (t->unsure.at[i].start < end && start < t->unsure.at[i].end)
			return true;
	return false;
}

/* A page of which nobody knows what it holds. Where the kernel has no poison the thread waits, and the owner hears of it. */
static int refuse_zeros(struct lp_task *t, uint64_t addr)
{
	struct uffdio_poison poison = {.range = {.start = addr, .len = LP_PAGE_SIZE}};
	int error = 0;

	if (ioctl(t->uffd, UFFDIO_POISON, &poison))
		error = poison.updated < 0 ? (int)-poison.updated : errno;
	if (lp_means_gone(error)) {
		is_gone(t);
		return -ESRCH;
	}
	if (error == EAGAIN || error == ENOMEM || error == EINTR)
		return -EAGAIN;
	if (error == EINVAL) { /* Linux before 6.6 */
		break_task(t, EADDRNOTAVAIL);
		return 0;
	}
	if (error) /* a page is there, or nothing is mapped any more */
		wake(t, addr, 1);
	else
		add(&t->stats.poisoned, 1);
	trace(t, LP_TRACE_POISONED, LP_TRACE_NO_SOURCE, addr, 1, 0);
	notify(t->engine, (struct lp_notice){
				  .kind = LP_NOTICE_LOST, .error = EADDRNOTAVAIL, .task = t, .addr = addr, .nr_pages = 1});
	return 0;
}

/* Answers one fault (lock held shared): 0, or -EAGAIN: not now, or -ESRCH. */
static int answer(struct lp_task *t, struct lp_fault fault)
{
	struct lp_answer run = lp_space_lookup(t->space, fault.addr, 1);
	struct lp_notice notice = {.task = t, .addr = run.addr, .image = run.image, .nr_pages = 1, .since = fault.since};
	struct lp_window window = {0};
	uint64_t first;
	int rc;

	if (run.kind == LP_DATA || run.kind == LP_REMOTE)
		window = lp_readahead_fault(&t->plan, fault.addr >> LP_PAGE_SHIFT);
	first = window.first << LP_PAGE_SHIFT;
	if (window.nr == 1)
		atomic_store_explicit(&t->engine->last_lone, fault.since, memory_order_relaxed);
	switch (run.kind) {
	case LP_ZERO:
		if (is_unsure(t, fault.addr, fault.addr + LP_PAGE_SIZE))
			return refuse_zeros(t, fault.addr);
		rc = zero_page(t, fault.addr);
		if (!rc) {
			add(&t->stats.faults_zero, fault.times);
			answered(t, fault.since, fault.times, LP_TRACE_ZERO, fault.addr, 1);
		}
		return rc;
	case LP_DATA:
		if (!claim_window(t, &run, window)) {
			trace(t, LP_TRACE_LEFT, trace_source(run.source), fault.addr, 1, 0);
			return leave_fault(t, fault);
		}
		/* the rest of the window first: the thread would be back for it at once */
		rc = bring(t, first, run.addr);
		if (!rc)
			rc = bring(t, run.addr + (run.nr_pages << LP_PAGE_SHIFT), first + (window.nr << LP_PAGE_SHIFT));
		if (rc)
			lp_space_release(t->space, run.dense, run.nr_pages);
		else
			rc = copy_level(t, &run, RELEASE, fault.addr, &t->look);
		if (!rc) {
			add(&t->stats.faults_served, fault.times);
			add(&t->served[run.source], fault.times);
			answered(t, fault.since, fault.times, trace_source(run.source), run.addr, run.nr_pages);
		}
		return rc;
	case LP_REMOTE:
		if (!claim_window(t, &run, window)) {
			trace(t, LP_TRACE_LEFT, LP_TRACE_REMOTE, fault.addr, 1, 0);
			return 0;
		}
		trace(t, LP_TRACE_WANTED, LP_TRACE_REMOTE, run.addr, run.nr_pages, run.image);
		begin_wait(t, (struct waiter){notice.image, fault.since, run.addr, run.nr_pages});
		if (lp_channels_fault(&t->engine->channels, t->tag, run.image, run.nr_pages, fault.since))
			return 0;
		notice.kind = LP_NOTICE_NEED;
		notice.addr = run.addr;
		notice.image = run.image;
		notice.nr_pages = run.nr_pages;
		break;
	case LP_CLAIMED:
		trace(t, LP_TRACE_LEFT, trace_source(run.source), fault.addr, 1, 0);
		if (run.source != LP_SOURCE_REMOTE) {
			lead_on(t, &fault);
			return leave_fault(t, fault);
		}
		begin_wait(t, (struct waiter){run.image, fault.since, run.addr, 1});
		if (lp_channels_hurry(&t->engine->channels, t->tag, run.image, fault.since))
			return 0;
		notice.kind = LP_NOTICE_HURRY;
		break;
	default:
		notice.kind = LP_NOTICE_LOST;
		break;
	}
	if (notify(t->engine, notice))
		return 0;
	if (notice.kind == LP_NOTICE_NEED)
		lp_space_release(t->space, run.dense, run.nr_pages);
	end_wait(t, notice.image, notice.image + LP_PAGE_SIZE, false);
	return -EAGAIN;
}

/* ---- layout events ---- */

static struct lp_task *task_alloc(struct lp_engine *e, int uffd, uint32_t nr_levels)
{
	struct lp_task *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->engine = e;
	t->uffd = uffd;
	/* CRIU's is non-blocking already, but one that is not would stop the service of all */
	fcntl(uffd, F_SETFL, O_NONBLOCK);
	t->nr_levels = nr_levels;
	t->levels = calloc(nr_levels + 1, sizeof(*t->levels));
	t->copied = calloc(3 * ((size_t)nr_levels + 2), sizeof(counter_t));
	if (!t->levels || !t->copied) {
		free(t->levels);
		free((void *)t->copied);
		free(t);
		return NULL;
	}
	t->dropped = t->copied + nr_levels + 2;
	t->served = t->dropped + nr_levels + 2;
	lp_lock_init(&t->lock);
	pthread_mutex_init(&t->waiting_lock, NULL);
	return t;
}

/*
 * Closed, it would let a task that still misses pages run on zeros, and what it is forking at this moment, too, of which
 * nobody has read yet.  Then it stays open, to the end of this process; after that the guard has it.  (Once nothing is
 * missing, there is nothing to be had by a fork that has not been read, either: from its beginning on the kernel has refused
 * all copies.)
 */
static void close_uffd(struct lp_task *t)
{
	bool safe = !lp_space_pending(t->space) && !atomic_load(&t->broken);

	if (safe || atomic_load(&t->gone) || lp_means_gone(try_page(t, LP_ANYWHERE))) {
		/* the number stays taken until the guard has forgotten what it knew of it */
		dup3(t->engine->wakefd, t->uffd, O_CLOEXEC);
		lp_guard_names(t->engine->guard, t->uffd, 0, -1);
		close(t->uffd);
	}
	t->uffd = -1;
}

static void forget_seen(struct seen *seen);

static void task_free(struct lp_task *t)
{
	lp_guarded_forget(&t->engine->guarded, t);
	if (t->uffd >= 0)
		close_uffd(t);
	for (size_t i = 0; i < t->nr_changes; i++)
		forget_seen(t->changes[i].seen);
	free(t->unsure.at);
	free(t->changes); /* the uffds of children that it knows of stay open, as above */
	lp_space_free(t->space);
	lp_lock_destroy(&t->lock);
	pthread_mutex_destroy(&t->waiting_lock);
	free(t->waiting);
	lp_faults_free(&t->faults);
	lp_faults_free(&t->left);
	free(t->levels);
	free((void *)t->copied);
	free(t);
}

/* It has its tag, and what it waits for. parent: the number of the memory that it was forked from. */
static void number_memory(struct lp_task *t, uint32_t parent)
{
	t->number = atomic_fetch_add(&t->engine->nr_memories, 1) + 1;
	trace(t, LP_TRACE_MEMORY, LP_TRACE_NO_SOURCE, 0, t->total, parent);
}

/* From here on the engine owns it, and it may be closed. */
static void task_link(struct lp_task *t)
{
	struct lp_engine *e = t->engine;

	pthread_mutex_lock(&e->lock);
	t->next = e->tasks;
	e->tasks = t;
	t->next_kin = e->families[t->tag % FAMILIES];
	e->families[t->tag % FAMILIES] = t;
	pthread_mutex_unlock(&e->lock);
}

/* From here on the engine serves it, unless it has been closed already. */
static int task_start(struct lp_task *t)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = t};
	int rc = 0;

	lp_lock_alone(&t->lock);
	if (t->uffd >= 0 && epoll_ctl(t->engine->epfd, EPOLL_CTL_ADD, t->uffd, &event))
		rc = -errno;
	if (t->uffd >= 0 && !rc)
		check_complete(t);
	lp_unlock_alone(&t->lock);
	return rc;
}

struct seen {
	struct ranges wiped, kept;
	bool failed; /* there was no memory */
};

static bool add_range(struct ranges *r, uint64_t start, uint64_t end)
{
	if (r->nr == r->cap) {
		size_t cap = r->cap ? r->cap * 2 : 16;
		struct lp_range *at = realloc(r->at, cap * sizeof(*at));

		if (!at)
			return false;
		r->at = at;
		r->cap = cap;
	}
	r->at[r->nr++] = (struct lp_range){start, end};
	return true;
}

static void add_seen(void *arg, uint64_t start, uint64_t end, bool wiped)
{
	struct seen *seen = arg;

	if (!add_range(wiped ? &seen->wiped : &seen->kept, start, end))
		seen->failed = true;
}

/*
 * What a child finds zeroed.  The image knows what the task had said of that when it was dumped; what it has said since
 * (MADV_WIPEONFORK, MADV_KEEPONFORK) no event tells, and only smaps shows.
 *
 * Of what is not mapped any more, or not there yet, since its event has still to be read, smaps says nothing: that stays as
 * it was.
 *
 * Two things can't be told so.  The event has been read, so the thread that forks goes on already: what it, or another
 * one, says until smaps is read (it walks page tables: some milliseconds for much memory) counts as said before the fork.
 * And of a forked child the process is not known: what it says itself, about pages that it has never touched, its own
 * children do not feel: they find what was there, and not zeros.
 */
static struct seen *look_at_mappings(struct lp_task *t)
{
	struct seen *seen;
	int rc;

	if (!t->pid || !lp_space_pending(t->space))
		return NULL;
	seen = calloc(1, sizeof(*seen));
	if (!seen) {
		break_task(t, ENOMEM);
		return NULL;
	}
	/* after an execve it is of another memory */
	rc = lp_each_mapping(t->pid, t->pidfd, add_seen, seen);
	if (rc == -EMFILE || rc == -ENFILE || rc == -ENOMEM || seen->failed)
		break_task(t, rc ? -rc : ENOMEM); /* read later, it would be what was said since */
	else if (rc || lp_means_gone(try_page(t, LP_ANYWHERE)))
		seen->wiped.nr = seen->kept.nr = 0;
	return seen;
}

static void forget_seen(struct seen *seen)
{
	if (!seen)
		return;
	free(seen->wiped.at);
	free(seen->kept.at);
	free(seen);
}

/* As soon as a fork has been read, and used when its child is made, when all has changed that smaps has shown. */
static void learn_wiped(struct lp_task *t, struct seen *seen)
{
	if (seen && lp_space_wipe(t->space, seen->wiped.at, seen->wiped.nr, seen->kept.at, seen->kept.nr))
		break_task(t, ENOMEM);
	forget_seen(seen);
}

/* ---- what the kernel says of the layout, for csrc/serve/doubt.h ---- */

/* -ENOENT only when it is so at rest: the kernel looks for the mapping before it looks whether the layout is changing. */
static int told_at_rest(struct lp_task *t, int error)
{
	if (error == ENOMEM || error == EINTR || (error == ENOENT && try_page(t, LP_ANYWHERE) == EAGAIN))
		return -EAGAIN;
	if (lp_means_gone(error))
		return -ESRCH;
	return error == EINVAL ? -ENOENT : -error; /* EINVAL: beyond all addresses */
}

static int ask_within(void *arg, uint64_t start, uint64_t end)
{
	struct lp_task *t = arg;

	return told_at_rest(t, lp_probe_range(t->uffd, start, end));
}

static int ask_zero(void *arg, uint64_t addr)
{
	struct uffdio_zeropage zero = {.range = {.start = addr, .len = LP_PAGE_SIZE}};
	struct lp_task *t = arg;

	if (ioctl(t->uffd, UFFDIO_ZEROPAGE, &zero))
		return told_at_rest(t, zero.zeropage < 0 ? (int)-zero.zeropage : errno);
	add(&t->stats.zero_pages, 1);
	return 0;
}

static bool ask_alike(void *arg, uint64_t edge, uint64_t start, uint64_t end)
{
	const struct lp_task *t = arg;

	return lp_mappings_alike(t->pid, t->pidfd, edge, start, end);
}

static bool ask_grows(void *arg, uint64_t addr)
{
	const struct lp_task *t = arg;

	return lp_mapping_grows(t->pid, t->pidfd, addr);
}

static void lose_range(struct lp_task *t, uint64_t start, uint64_t end)
{
	struct lp_answer run;

	for (; start < end; start += run.nr_pages << LP_PAGE_SHIFT) {
		run = lp_space_lookup(t->space, start, (end - start) >> LP_PAGE_SHIFT);
		if (run.kind == LP_ZERO || run.kind == LP_LOST)
			continue;
		lp_space_lose(t->space, run.dense, run.nr_pages);
		if (!t->untold)
			notify_lost(t, &run, 0, run.nr_pages, EADDRNOTAVAIL);
		else if (!t->untold->nr_pages)
			*t->untold = run;
	}
}

static void range_stays(void *arg, uint64_t start, uint64_t end, bool known)
{
	struct lp_task *t = arg;

	if (!known)
		lose_range(t, start, end);
	wake(t, start, (end - start) >> LP_PAGE_SHIFT);
}

static struct lp_ask asking(struct lp_task *t)
{
	return (struct lp_ask){t, ask_within, ask_zero, ask_alike, ask_grows, range_stays};
}

/* ---- forks ---- */

/* What has been reported with a fork, of which some may have happened before it and some since. */
struct unrest {
	struct lp_space *before; /* NULL: nothing has */
	struct lp_change *made;
	size_t nr_made;
	bool tangled; /* of the child that was made last */
};

static bool drain(struct lp_task *t);

/*
 * The space of a child by what it has, with what is dropped from it.  If that can't be found out, all is lost.  Without memory the
 * child has no space.
 */
static void replay(struct lp_task *t, struct lp_task *child, struct unrest *unrest, uint64_t told,
		   struct lp_counts *dropped)
{
	const struct timespec pause = {.tv_nsec = CHILD_PAUSE_NS};
	const struct lp_ask of_child = asking(child), of_parent = asking(t);
	int rc = -EAGAIN;

	if (lp_space_wipe_as(unrest->before, t->space))
		return;
	for (int tries = 0; rc && tries <= CHILD_TRIES; tries++) {
		lp_space_free(child->space);
		child->untold->nr_pages = 0;
		memset(dropped->by_source, 0, (t->nr_levels + 2) * sizeof(uint64_t));
		child->space = lp_space_clone(unrest->before, dropped);
		if (!child->space)
			return;
		if (tries == CHILD_TRIES)
			break;
		rc = lp_replay(child->space, unrest->made, unrest->nr_made, told, tries, &of_child, &of_parent,
			       dropped, &unrest->tangled);
		if (rc) { /* its layout is changing already */
			drain(child);
			if (tries < CHILD_YIELDS)
				sched_yield();
			else
				nanosleep(&pause, NULL);
		}
	}
	if (rc) {
		unrest->tangled = true;
		while (lp_space_nr_doubts(child->space))
			if (lp_space_answer_doubt(child->space, 0, false, dropped)) {
				lp_space_free(child->space);
				child->space = NULL;
				return;
			}
		for (size_t r = 0; r < lp_space_nr_regions(child->space); r++)
			lose_range(child, lp_space_regions(child->space)[r].start, lp_space_regions(child->space)[r].end);
	}
	/* faults again when it is served */
	while (child->faults.nr)
		wake(child, lp_faults_pop(&child->faults).addr, 1);
}

static bool replaces_poison(struct lp_task *child, struct uffdio_copy *copy)
{
	for (int tries = 0; tries < CHILD_TRIES; tries++) {
		if (!ioctl(child->uffd, UFFDIO_COPY, copy))
			return true;
		if (copy->copy != -EAGAIN && errno != EAGAIN)
			break;
		drain(child); /* its layout is changing already */
		sched_yield();
	}
	return false;
}

/*
 * A page where the parent has a guard by now: has the child one, too?  Poison is not placed over a guard (EEXIST).  Where it is
 * placed there was none when the process forked, and the page takes its place at once: the child does not run yet, or hardly.
 */
static void inherit_page(struct lp_task *child, const struct lp_answer *page)
{
	const struct lp_level *level = &child->levels[page->source];
	struct uffdio_poison poison = {.range = {.start = page->addr, .len = LP_PAGE_SIZE}};
	struct uffdio_copy copy = {
		.dst = page->addr, .src = (uintptr_t)level->base + page->offset, .len = LP_PAGE_SIZE};

	if (lp_pages_held(level->fd, page->offset, 1) != 1 || !lp_space_claim(child->space, page->dense, 1))
		return;
	if (ioctl(child->uffd, UFFDIO_POISON, &poison) && poison.updated == -EEXIST) {
		drop_pages(child, page, 0, 1);
	} else if (poison.updated > 0 && replaces_poison(child, &copy)) {
		add(&child->copied[page->source], 1);
		lp_space_commit(child->space, page->dense, 1);
	} else {
		lp_space_release(child->space, page->dense, 1); /* a copy over poison heals it */
	}
}

static void inherit_range(struct lp_task *child, struct lp_range guard)
{
	for (uint64_t addr = guard.start; addr < guard.end;) {
		struct lp_answer run = lp_space_lookup(child->space, addr, (guard.end - addr) >> LP_PAGE_SHIFT);

		addr += run.nr_pages << LP_PAGE_SHIFT;
		for (uint64_t i = 0; run.kind == LP_DATA && i < run.nr_pages; i++) {
			struct lp_answer page = rest_of(&run, i);

			inherit_page(child, &page);
		}
	}
}

/* A child has the guards that its parent had when it forked, and its process is not known: they are looked for in the parent. */
static void inherit_guards(struct lp_task *t, struct lp_task *child)
{
	struct lp_guarded *g = &t->engine->guarded;
	struct lp_guarded_task task = guarded_task(t);
	size_t nr = lp_space_nr_regions(t->space);
	struct lp_range guard;
	int fd;

	if (!g->category || !t->pid || !nr || !lp_space_pending(child->space))
		return;
	fd = lp_guarded_take(g, &task);
	if (fd < 0)
		return;
	for (size_t r = 0; r < nr; r++) {
		uint64_t at = lp_space_regions(t->space)[r].start, end = lp_space_regions(t->space)[r].end;

		for (; !lp_guarded_scan(fd, g->category, at, end, &guard) && guard.start < guard.end; at = guard.end)
			inherit_range(child, guard);
	}
	lp_guarded_give(g, t, fd);
}

static bool inherit_unsure(const struct lp_task *t, struct lp_task *child, const struct unrest *unrest)
{
	for (size_t i = 0; i < t->unsure.nr; i++)
		if (!add_range(&child->unsure, t->unsure.at[i].start, t->unsure.at[i].end))
			return false;
	if (!unrest->before || !unrest->tangled)
		return true;
	for (size_t i = 0; i < unrest->nr_made; i++) {
		const struct lp_change *change = &unrest->made[i];

		if (!add_range(&child->unsure, change->start, change->start + change->len) ||
		    (change->kind == LP_REMAPPED &&
		     !add_range(&child->unsure, change->to, change->to + change->len)))
			return false;
	}
	return true;
}

static void forked(struct lp_task *t, const struct lp_change *fork, struct unrest *unrest)
{
	struct lp_task *child = task_alloc(t->engine, fork->uffd, t->nr_levels);
	struct lp_counts dropped = {.nr_levels = t->nr_levels};
	struct lp_answer lost = {0};
	bool behind;
	int rc;

	add(&t->stats.forks, 1);
	if (!child) {
		forget_seen(fork->seen);
		break_task(t, ENOMEM);
		return;
	}
	child->untold = &lost;
	child->tag = t->tag;
	learn_wiped(t, fork->seen);
	dropped.by_source = calloc(t->nr_levels + 2, sizeof(uint64_t));
	if (dropped.by_source && unrest->before)
		replay(t, child, unrest, fork->to, &dropped);
	else if (dropped.by_source)
		child->space = lp_space_clone(t->space, &dropped);
	child->untold = NULL;
	child->read_error = 0;
	child->next_try = 0;
	if (atomic_load(&t->broken) || !child->space || !inherit_unsure(t, child, unrest)) {
		break_task(t, ENOMEM);
		child->uffd = -1; /* it stays open */
		free(dropped.by_source);
		task_free(child);
		return;
	}
	child->total = lp_space_pending(child->space);
	for (uint32_t i = 0; i < t->nr_levels + 2; i++)
		child->total += dropped.by_source[i];
	drop_into(child, dropped.by_source);
	free(dropped.by_source);
	memcpy(child->levels, t->levels, t->nr_levels * sizeof(*t->levels));
	child->remote = t->remote;
	child->is_child = true;
	number_memory(child, t->number);
	lp_readahead_init(&child->plan, t->plan.max_window);
	inherit_guards(t, child);
	behind = child->nr_changes || child->faults.nr; /* nothing is to be read of these any more; another thread may serve it soon */
	task_link(child); /* whoever is told of it may close it at once */
	/* told before it is served, so that its first notice comes after this one */
	notify(t->engine, (struct lp_notice){.kind = LP_NOTICE_FORKED, .task = child});
	if (lost.nr_pages)
		notify_lost(child, &lost, 0, lost.nr_pages, EADDRNOTAVAIL);
	rc = task_start(child);
	if (rc)
		notify_task(child, LP_NOTICE_FAILED, -rc);
	if (behind)
		take_back(child);
}

/* Makes one change in the space. */
static void make_change(struct lp_task *t, const struct lp_change *change, struct unrest *unrest)
{
	uint64_t counters[16] = {0};
	uint64_t *by_source = t->nr_levels + 2 <= 16 ? counters : calloc(t->nr_levels + 2, sizeof(uint64_t));
	struct lp_counts dropped = {by_source, t->nr_levels};
	uint64_t end = change->start + change->len;
	int rc = by_source ? 0 : -ENOMEM;

	if (rc || change->kind == LP_QUESTION)
		goto out;
	t->layout++;
	switch (change->kind) {
	case LP_FORKED:
		forked(t, change, unrest);
		break;
	case LP_REMOVED:
		add(&t->stats.removes, 1);
		lp_space_remove(t->space, change->start, end, &dropped);
		break;
	case LP_UNMAPPED:
		add(&t->stats.unmaps, 1);
		rc = lp_space_matters(t->space, change->start, end) ?
			     lp_space_question(t->space, change->start, end) :
			     lp_space_unmap(t->space, change->start, end, &dropped);
		break;
	case LP_REMAPPED:
		add(&t->stats.remaps, 1);
		rc = lp_space_remap(t->space, change->start, change->to, change->len, &dropped);
		if (!rc && is_unsure(t, change->start, end) && !add_range(&t->unsure, change->to, change->to + change->len))
			rc = -ENOMEM;
		break;
	}
	trace(t, LP_TRACE_FORKED + change->kind, LP_TRACE_NO_SOURCE, change->start, change->len >> LP_PAGE_SHIFT,
	      change->kind == LP_REMAPPED ? change->to : 0);
	if (change->kind != LP_FORKED)
		wake(t, change->start, change->len >> LP_PAGE_SHIFT);
	drop_into(t, by_source);
out:
	if (by_source != counters)
		free(by_source);
	if (rc)
		break_task(t, -rc); /* with a layout that we do not know every answer could be wrong */
}

static void append_change(struct lp_task *t, struct lp_change change)
{
	if (t->nr_changes == t->cap_changes) {
		size_t cap = t->cap_changes ? t->cap_changes * 2 : 16;
		struct lp_change *changes = realloc(t->changes, cap * sizeof(*changes));

		if (!changes) {
			break_task(t, ENOMEM);
			return;
		}
		t->changes = changes;
		t->cap_changes = cap;
	}
	t->changes[t->nr_changes++] = change;
}

static void keep_change(struct lp_task *t, const struct uffd_msg *msg)
{
	struct lp_change change = {0};

	switch (msg->event) {
	case UFFD_EVENT_FORK:
		change = (struct lp_change){.kind = LP_FORKED, .uffd = (int)msg->arg.fork.ufd, .to = t->told++,
					    .seen = look_at_mappings(t)};
		break;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		change.kind = msg->event == UFFD_EVENT_REMOVE ? LP_REMOVED : LP_UNMAPPED;
		change.start = msg->arg.remove.start;
		change.len = msg->arg.remove.end - msg->arg.remove.start;
		change.to = t->told++;
		break;
	case UFFD_EVENT_REMAP:
		change = (struct lp_change){
			.kind = LP_REMAPPED,
			.start = msg->arg.remap.from,
			.len = msg->arg.remap.len,
			.to = msg->arg.remap.to,
		};
		break;
	default:
		notify_task(t, LP_NOTICE_FAILED, EPROTO);
		return;
	}
	t->changes[t->nr_changes++] = change; /* there is room: room_for_messages */
}

/* Whether a fork is among the changes, and something that it may have come before or after. */
static bool needs_unrest(const struct lp_task *t)
{
	bool forks = false, others = lp_space_nr_doubts(t->space);

	for (size_t i = 0; i < t->nr_changes; i++) {
		forks |= t->changes[i].kind == LP_FORKED;
		others |= t->changes[i].kind == LP_REMAPPED || t->changes[i].kind == LP_REMOVED ||
			  (t->changes[i].kind == LP_UNMAPPED &&
			   lp_space_matters(t->space, t->changes[i].start, t->changes[i].start + t->changes[i].len));
	}
	return forks && others;
}

static void begin_unrest(struct lp_task *t, struct unrest *unrest)
{
	unrest->made = calloc(t->nr_changes, sizeof(*unrest->made));
	unrest->before = lp_space_copy(t->space);
	if (!unrest->made || !unrest->before)
		break_task(t, ENOMEM);
}

/* Asks what unmapping has done.  If the layout is not at rest any more, the question is kept, and nothing is answered. */
static void settle(struct lp_task *t)
{
	struct lp_counts dropped = {calloc(t->nr_levels + 2, sizeof(uint64_t)), t->nr_levels};
	const struct lp_ask ask = asking(t);
	int rc = -ENOMEM;

	if (dropped.by_source) {
		rc = lp_settle(t->space, &ask, &dropped);
		drop_into(t, dropped.by_source);
	}
	if (rc)
		append_change(t, (struct lp_change){.kind = LP_QUESTION});
	free(dropped.by_source);
}

/* Those that can be made already, or all of them when the layout is at rest. */
static void make_changes(struct lp_task *t, bool at_rest)
{
	struct lp_change *changes = t->changes;
	size_t nr = t->nr_changes, next;
	struct unrest unrest = {0};

	if (at_rest) {
		for (size_t i = 0; i < nr; i++)
			if (changes[i].kind == LP_REMAPPED) {
				if (lp_tells_old_length())
					lp_true_lengths(changes, nr);
				break;
			}
		if (needs_unrest(t))
			begin_unrest(t, &unrest);
	}
	while (nr && !atomic_load(&t->broken) && (next = lp_space_next_change(t->space, changes, nr, at_rest)) < nr) {
		struct lp_change change = changes[next];

		memmove(&changes[1], changes, next * sizeof(change));
		changes++;
		nr--;
		make_change(t, &change, &unrest);
		if (unrest.before)
			unrest.made[unrest.nr_made++] = change;
	}
	lp_space_free(unrest.before);
	free(unrest.made);
	if (nr == t->nr_changes)
		return;
	memmove(t->changes, changes, nr * sizeof(*changes));
	t->nr_changes = nr;
	if (at_rest && !atomic_load(&t->broken)) {
		lp_space_rest(t->space);
		if (lp_space_nr_doubts(t->space))
			settle(t);
	}
	if (t->remote)
		lp_space_index(t->space);
	check_complete(t);
}

/* As when there is no fd left for the uffd of a forked child, or no memory: the task waits, and is looked at again later. */
static void read_failed(struct lp_task *t, int error)
{
	struct epoll_event none = {.data.ptr = t};

	if (!t->read_error && !t->untold) /* of a child that nobody knows it is reported when it is read again */
		notify_task(t, LP_NOTICE_FAILED, error);
	epoll_ctl(t->engine->epfd, EPOLL_CTL_MOD, t->uffd, &none); /* it stays readable */
	t->read_error = error;
	t->next_try = now_ns() + READ_RETRY_NS;
}

static void read_works(struct lp_task *t)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = t};

	if (t->read_error)
		epoll_ctl(t->engine->epfd, EPOLL_CTL_MOD, t->uffd, &event);
	t->read_error = 0;
}

/* What has been read is never to be lost. */
static bool room_for_messages(struct lp_task *t)
{
	if (t->cap_changes - t->nr_changes < MESSAGES) {
		size_t cap = t->nr_changes + 2 * MESSAGES;
		struct lp_change *changes = realloc(t->changes, cap * sizeof(*changes));

		if (!changes)
			return false;
		t->changes = changes;
		t->cap_changes = cap;
	}
	return lp_faults_reserve(&t->faults, MESSAGES);
}

/*
 * Reads all that the uffd has to say (lock held exclusively): faults go to t->faults, layout events to t->changes.
 * False when there is more that can't be read now.
 */
static bool drain(struct lp_task *t)
{
	struct uffd_msg msgs[MESSAGES];
	uint64_t now = 0;
	int error = 0;
	ssize_t n;

	do {
		if (!room_for_messages(t)) {
			error = ENOMEM;
			break;
		}
		add(&t->stats.reads, 1);
		n = read(t->uffd, msgs, sizeof(msgs));
		if (n < 0) {
			error = errno == EINTR || errno == EAGAIN ? 0 : errno;
			if (errno == EINTR)
				continue;
			break;
		}
		for (size_t i = 0; i < (size_t)n / sizeof(*msgs); i++) {
			uint64_t addr = msgs[i].arg.pagefault.address & ~(LP_PAGE_SIZE - 1);

			if (msgs[i].event != UFFD_EVENT_PAGEFAULT) {
				keep_change(t, &msgs[i]);
				continue;
			}
			if (!now)
				now = now_ns();
			add(&t->stats.faults, 1);
			if (t->engine->trace)
				trace_at(t, now, LP_TRACE_FAULT, LP_TRACE_NO_SOURCE, addr, 1, 0);
			lp_faults_push(&t->faults, (struct lp_fault){.addr = addr, .since = now, .times = 1});
		}
		/* a read that got faults does not say that the event behind them can't be read (fs/userfaultfd.c, userfaultfd_read) */
	} while (n < 0 || n == sizeof(msgs) || t->read_error);
	if (now)
		atomic_store_explicit(&t->engine->last_fault, now, memory_order_relaxed);
	if (t->nr_changes)
		atomic_store_explicit(&t->last_change, now_ns(), memory_order_relaxed);
	if (error)
		read_failed(t, error);
	else
		read_works(t);
	return !error;
}

/*
 * Reads, and makes the changes that have been told (lock held exclusively).  As long as one of them has to wait nothing is
 * answered, which the kernel would refuse with EAGAIN anyway: it counts the changes that have begun and have not been read,
 * and those whose threads have not run since.
 */
static void catch_up(struct lp_task *t)
{
	int error = EAGAIN;

	for (int tries = 0; error == EAGAIN; tries++) {
		bool all = drain(t);

		make_changes(t, false);
		if (!all || !t->nr_changes || tries == REST_TRIES)
			return;
		error = try_page(t, LP_ANYWHERE);
		if (error == EAGAIN)
			sched_yield(); /* they may need this CPU */
	}
	if (lp_means_gone(error))
		is_gone(t);
	make_changes(t, true);
}

/* Answers that can't be given yet; all but `before` of them are new. */
static void put_off(struct lp_task *t, size_t before)
{
	struct lp_faults *f = &t->faults;
	size_t new = f->nr > before ? f->nr - before : 0;

	for (size_t n = f->nr - new; n < f->nr; n++) {
		add(&t->stats.retried, lp_faults_at(f, n)->times);
		trace(t, LP_TRACE_PUT_OFF, LP_TRACE_NO_SOURCE, lp_faults_at(f, n)->addr, 1, 0);
	}
	try_again(t);
}

/* Answers what has been read (lock held shared).  One EAGAIN means that all get it now: it is for the layout of the task. */
static void answer_all(struct lp_task *t, size_t before)
{
	struct lp_faults *f = &t->faults;
	size_t answered_here = 0;
	int rc = 0;

	if (f->nr >= CROWD)
		atomic_store_explicit(&t->last_crowd, now_ns(), memory_order_relaxed);
	while (f->nr && rc != -EAGAIN) {
		struct lp_fault fault;

		/* after the first answer: sorting is in vain while the layout is changing */
		if (answered_here == 1 && f->nr >= CROWD) {
			lp_faults_sort(f, t->sweep);
			t->batching = true;
		}
		if (t->batching && answered_here % BATCH == 0)
			wake_batch(t);
		fault = lp_faults_pop(f);
		rc = answer(t, fault);
		if (rc == -EAGAIN)
			/* to the end: there may be another reason, which the others don't have. There is room, its own */
			lp_faults_push(f, fault);
		else
			answered_here++;
		if (t->batching)
			t->sweep = fault.addr + LP_PAGE_SIZE;
	}
	if (t->batching)
		wake_batch(t);
	t->batching = false;
	if (answered_here)
		t->engine->retry = RETRY_FIRST_NS;
	if (f->nr)
		put_off(t, before > answered_here ? before - answered_here : 0);
}

/* Reads and answers all; false when something could not be answered yet. */
static bool serve_once(struct lp_task *t)
{
	size_t before = t->faults.nr;
	uint64_t since;

	lp_lock_alone(&t->lock);
	if (is_served(t))
		catch_up(t);
	if (!is_served(t)) {
		if (t->uffd >= 0) /* it stays readable */
			epoll_ctl(t->engine->epfd, EPOLL_CTL_DEL, t->uffd, NULL);
		lp_unlock_alone(&t->lock);
		return true;
	}
	if (t->read_error || t->nr_changes) {
		put_off(t, before);
		if (!t->read_error) {
			t->pause = t->pause ? 2 * t->pause : RETRY_FIRST_NS;
			if (t->pause > RETRY_MOST_NS)
				t->pause = RETRY_MOST_NS;
			t->next_try = now_ns() + t->pause;
		}
		lp_unlock_alone(&t->lock);
		return false;
	}
	t->pause = 0;
	if (t->look_at_left || t->left.nr)
		look_at_left(t);
	if (!t->faults.nr) {
		lp_unlock_alone(&t->lock);
		return true;
	}
	lp_lock_downgrade(&t->lock);
	if (t->engine->ready == 1 && t->faults.nr == 1 && !before)
		lp_follow_yield(&t->engine->follow, lp_faults_at(&t->faults, 0)->since);
	else
		lp_follow_insist(&t->engine->follow);
	since = t->faults.nr > before ? lp_faults_at(&t->faults, before)->since : 0;
	answer_all(t, before);
	lp_unlock_shared(&t->lock);
	if (since)
		lp_follow_fault(&t->engine->follow, t->pid, since, t->engine->ready);
	return !t->faults.nr;
}

/* A thread that changes the layout is done soon, once it has been told of; before others have their turn it is waited for. */
static void serve(struct lp_task *t)
{
	for (int tries = 0; tries < SERVE_TRIES && !serve_once(t) && !t->read_error; tries++)
		sched_yield(); /* it may need this CPU */
}

/* ---- the engine ---- */

/* Pages that a channel has received: for the task and for what it has forked, as lp_task_deliver. */
static int place(void *arg, uint64_t tag, uint64_t image, uint64_t nr_pages, const void *bytes)
{
	struct lp_engine *e = arg;
	size_t nr = 0;
	int rc = 0;

	pthread_mutex_lock(&e->lock);
	for (struct lp_task *t = e->families[tag % FAMILIES]; t; t = t->next_kin) {
		if (t->tag != tag)
			continue;
		if (nr == e->cap_kin) {
			size_t cap = e->cap_kin ? e->cap_kin * 2 : 16;
			struct lp_task **kin = realloc(e->kin, cap * sizeof(*kin));

			if (!kin) {
				pthread_mutex_unlock(&e->lock);
				return -EAGAIN;
			}
			e->kin = kin;
			e->cap_kin = cap;
		}
		e->kin[nr++] = t;
	}
	pthread_mutex_unlock(&e->lock);
	if (e->ready == 1 && nr == 1 && e->kin[0]->nr_waiting == 1)
		lp_follow_yield(&e->follow, now_ns());
	else
		lp_follow_insist(&e->follow);
	/* Again for all of them after EAGAIN: who has the pages does not wait for them. */
	for (size_t i = 0; i < nr; i++)
		if (lp_task_deliver(e->kin[i], image, nr_pages, bytes) == -EAGAIN)
			rc = -EAGAIN;
	return rc;
}

struct lp_engine *lp_engine_new(struct lp_guard *guard)
{
	struct lp_engine *e = calloc(1, sizeof(*e));
	struct epoll_event event = {.events = EPOLLIN};

	if (!e)
		return NULL;
	pthread_mutex_init(&e->lock, NULL);
	lp_guarded_init(&e->guarded);
	atomic_init(&e->follow.cpu, -1);
	e->guard = guard;
	e->retry = RETRY_FIRST_NS;
	e->epfd = epoll_create1(EPOLL_CLOEXEC);
	e->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->noticefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->nowhere = mmap(NULL, LP_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (e->nowhere == MAP_FAILED || e->epfd < 0 || e->wakefd < 0 || e->noticefd < 0 ||
	    epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->wakefd, &event) || lp_mappings_reserve()) {
		int saved = errno;

		lp_engine_free(e);
		errno = saved;
		return NULL;
	}
	lp_channels_init(&e->channels, e->epfd, e->wakefd, place, e);
	return e;
}

struct lp_channels *lp_engine_channels(struct lp_engine *e)
{
	return &e->channels;
}

/* Tasks whose background has given claims back. */
static void take_released(struct lp_engine *e)
{
	struct lp_task *t, *next;

	for (t = atomic_exchange(&e->released, NULL); t; t = next) {
		next = t->next_released;
		atomic_store(&t->released, false); /* from here on it may be in the list again */
		t->look_at_left = true;
		try_again(t);
	}
}

static void bury(struct lp_engine *e)
{
	struct lp_task *dead, **link;

	pthread_mutex_lock(&e->lock);
	dead = e->dead;
	e->dead = NULL;
	pthread_mutex_unlock(&e->lock);
	take_released(e); /* no thread of the background puts a closed task there any more, but one may have done so before */
	while (dead) {
		struct lp_task *t = dead;

		dead = t->next_dead;
		for (link = &e->put_off; t->is_put_off && *link; link = &(*link)->next_put_off)
			if (*link == t) {
				*link = t->next_put_off;
				break;
			}
		lp_channels_forget(&e->channels, t);
		task_free(t);
	}
}

void lp_engine_free(struct lp_engine *e)
{
	if (!e)
		return;
	bury(e);
	while (e->tasks) {
		struct lp_task *t = e->tasks;

		e->tasks = t->next;
		task_free(t);
	}
	lp_channels_free(&e->channels);
	lp_guarded_end(&e->guarded);
	free(e->kin);
	if (e->epfd >= 0)
		close(e->epfd);
	if (e->wakefd >= 0)
		close(e->wakefd);
	if (e->noticefd >= 0)
		close(e->noticefd);
	if (e->nowhere != MAP_FAILED)
		munmap(e->nowhere, LP_PAGE_SIZE);
	pthread_mutex_destroy(&e->lock);
	free(e->notices);
	free(e);
}

int lp_engine_notice_fd(const struct lp_engine *e)
{
	return e->noticefd;
}

bool lp_engine_has_tasks(struct lp_engine *e)
{
	bool any;

	pthread_mutex_lock(&e->lock);
	any = e->tasks != NULL;
	pthread_mutex_unlock(&e->lock);
	return any;
}

static void serve_put_off(struct lp_engine *e)
{
	struct lp_task *t = e->put_off, *next;
	uint64_t now = now_ns();

	e->put_off = NULL;
	for (; t; t = next) {
		next = t->next_put_off;
		t->is_put_off = false;
		if ((t->read_error || t->pause) && now < t->next_try)
			try_again(t);
		else
			serve(t);
	}
	e->soon = false;
	for (t = e->put_off; t && !e->soon; t = t->next_put_off)
		e->soon = !t->read_error;
}

/* ns until what was put off is tried again; less often while that is in vain. */
static uint64_t retry_after(struct lp_engine *e)
{
	uint64_t now = e->retry;

	e->retry = 2 * now < RETRY_MOST_NS ? 2 * now : RETRY_MOST_NS;
	return now;
}

/* As epoll_wait, but ns. */
static int wait_for(struct lp_engine *e, struct epoll_event *events, uint64_t ns)
{
	const struct timespec most = {.tv_nsec = (long)ns};
	int n = (int)syscall(SYS_epoll_pwait2, e->epfd, events, EVENTS, &most, NULL, 0);

	if (n < 0 && errno == ENOSYS) /* Linux before 5.11 */
		n = epoll_wait(e->epfd, events, EVENTS, (int)((ns + 999999) / 1000000));
	return n;
}

static int next_events(struct lp_engine *e, struct epoll_event *events, bool again)
{
	bool following = atomic_load(&e->follow.cpu) >= 0;
	int n = 0;

	if (atomic_load(&e->follow.yields)) {
		/*
		 * A page server on this machine may run on this CPU now.  When it answers, we don't take the CPU from it
		 * before it sleeps again: beside it, the thread that gets the page would be sent to another one.
		 */
		const struct timespec expected = {.tv_nsec = lp_channels_expect(&e->channels) ? EXPECTED_NS : 0};

		n = (int)syscall(SYS_epoll_pwait2, e->epfd, events, EVENTS, &expected, NULL, 0);
		if (n <= 0) { /* Linux before 5.11 has no such call */
			n = 0;
			lp_follow_insist(&e->follow);
		}
	}
	if (n)
		return n;
	if (again || e->soon)
		return wait_for(e, events, retry_after(e));
	if (e->put_off)
		return wait_for(e, events, READ_RETRY_NS);
	return epoll_wait(e->epfd, events, EVENTS, following ? IDLE_MS : -1);
}

int lp_engine_run(struct lp_engine *e)
{
	struct epoll_event events[EVENTS];
	int rc = 0;

	lp_tells_old_length(); /* found out while this thread is like any other, and nobody waits */
	lp_follow_init(&e->follow);
	atomic_store(&lp_spins, e->follow.able ? LP_SPINS : LP_SPINS_ONE_CPU);
	while (!rc && !atomic_load(&e->stop)) {
		bool again;
		int n;

		/* no task or channel that epoll_wait has named is buried before the next epoll_wait */
		take_released(e);
		bury(e);
		again = lp_channels_round(&e->channels);
		n = next_events(e, events, again);
		if (n < 0 && errno != EINTR)
			rc = -errno;
		e->ready = n;
		if (!n && !e->put_off)
			lp_follow_nobody(&e->follow);
		for (int i = 0; i < n; i++) {
			if (events[i].data.u64 & 1)
				lp_channel_ready((struct lp_channel *)(uintptr_t)(events[i].data.u64 & ~1ull));
			else if (events[i].data.ptr)
				serve(events[i].data.ptr);
			else
				clear_fd(e->wakefd);
		}
		take_released(e);
		e->soon = false;
		if (e->put_off)
			serve_put_off(e);
	}
	lp_follow_end(&e->follow);
	return rc;
}

void lp_engine_trace(struct lp_engine *e, struct lp_trace *trace)
{
	e->trace = trace;
}

void lp_engine_stop(struct lp_engine *e)
{
	atomic_store(&e->stop, true);
	signal_fd(e->wakefd);
}

/* ---- tasks ---- */

static bool within_levels(const struct lp_extent *e, const struct lp_level *levels, uint32_t nr_levels)
{
	uint64_t size;

	if (!e->lazy || e->source == LP_SOURCE_REMOTE || e->source == LP_SOURCE_LOST)
		return true;
	if (e->source >= nr_levels)
		return false;
	size = levels[e->source].size;
	return e->offset <= size && e->nr_pages <= (size - e->offset) >> LP_PAGE_SHIFT;
}

struct lp_memory *lp_memory_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
				size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped,
				const struct lp_level *levels, uint32_t nr_levels)
{
	struct lp_memory *m = calloc(1, sizeof(*m));

	if (!m)
		return NULL;
	m->nr_levels = nr_levels;
	m->levels = calloc(nr_levels + 1, sizeof(*m->levels));
	for (size_t i = 0; m->levels && i < nr_extents; i++) {
		m->remote |= extents[i].lazy && extents[i].source == LP_SOURCE_REMOTE;
		if (!within_levels(&extents[i], levels, nr_levels)) {
			lp_memory_free(m);
			errno = EINVAL;
			return NULL;
		}
	}
	if (m->levels)
		m->space = lp_space_new(extents, nr_extents, vmas, nr_vmas, wiped, nr_wiped);
	if (!m->space) {
		lp_memory_free(m);
		return NULL;
	}
	if (nr_levels)
		memcpy(m->levels, levels, nr_levels * sizeof(*levels));
	if (m->remote)
		lp_space_index(m->space);
	return m;
}

void lp_memory_free(struct lp_memory *m)
{
	int saved = errno;

	if (!m)
		return;
	lp_space_free(m->space);
	free(m->levels);
	free(m);
	errno = saved;
}

struct lp_task *lp_task_new(struct lp_engine *e, int uffd, struct lp_memory *memory, uint64_t max_readahead, pid_t pid,
			    int pidfd, uint64_t tag)
{
	struct lp_task *t = task_alloc(e, uffd, memory->nr_levels);

	if (!t) {
		lp_memory_free(memory);
		errno = ENOMEM;
		return NULL;
	}
	memcpy(t->levels, memory->levels, memory->nr_levels * sizeof(*t->levels));
	t->remote = memory->remote;
	t->space = memory->space;
	memory->space = NULL;
	lp_memory_free(memory);
	t->total = lp_space_pending(t->space);
	t->pid = pid;
	t->pidfd = pidfd;
	t->tag = tag;
	lp_guard_names(e->guard, uffd, pid, pidfd);
	number_memory(t, 0);
	lp_readahead_init(&t->plan, max_readahead);
	task_link(t); /* before it is served: what channels bring finds it by its tag */
	int rc = task_start(t);
	if (rc) {
		lp_task_close(t); /* the uffd stays open: it misses pages */
		errno = -rc;
		return NULL;
	}
	return t;
}

bool lp_task_close(struct lp_task *t)
{
	struct lp_engine *e = t->engine;
	bool spoilt = false;
	struct lp_task **link;
	size_t kept = 0;

	lp_lock_alone(&t->lock);
	t->closing = true;
	make_changes(t, true); /* a child whose uffd has come is not to be lost with its parent */
	epoll_ctl(e->epfd, EPOLL_CTL_DEL, t->uffd, NULL);
	close_uffd(t);
	lp_unlock_alone(&t->lock);
	pthread_mutex_lock(&e->lock);
	t->closed = true;
	for (link = &e->tasks; *link; link = &(*link)->next)
		if (*link == t) {
			*link = t->next;
			break;
		}
	for (link = &e->families[t->tag % FAMILIES]; *link; link = &(*link)->next_kin)
		if (*link == t) {
			*link = t->next_kin;
			break;
		}
	t->next_dead = e->dead;
	e->dead = t;
	for (size_t i = 0; i < e->nr_notices; i++) {
		if (e->notices[i].task != t)
			e->notices[kept++] = e->notices[i];
		else
			spoilt |= e->notices[i].kind == LP_NOTICE_LOST && e->notices[i].error == ESTALE;
	}
	e->nr_notices = kept;
	spoilt |= t->unheard & 1u << LP_NOTICE_BROKEN;
	pthread_mutex_unlock(&e->lock);
	return spoilt;
}

/* How much the background copies at a time: reading faults waits for it. */
static uint64_t chunk(struct lp_engine *e)
{
	uint64_t now = now_ns();

	if (now - atomic_load_explicit(&e->last_lone, memory_order_relaxed) < BUSY_NS)
		return CHUNK_LONE;
	if (now - atomic_load_explicit(&e->last_fault, memory_order_relaxed) < BUSY_NS)
		return CHUNK_BUSY;
	return CHUNK_QUIET;
}

/*
 * Claims and copies a run of the background (lock held shared).  In a crowd nobody is woken by the copy: whoever waits for one
 * of these pages has been left to us since we claimed it, or the serving thread has still to read the fault, will find the
 * page there, and wakes.
 */
static int bring_run(struct lp_task *t, struct lp_answer *run, struct lp_look *look)
{
	bool quietly = now_ns() - atomic_load_explicit(&t->last_crowd, memory_order_relaxed) < CROWD_NS;
	uint64_t begun = trace_begins(t), times_left = atomic_load(&t->times_left);
	int rc;

	run->nr_pages = lp_space_claim(t->space, run->dense, run->nr_pages);
	if (!run->nr_pages)
		return 0;
	rc = copy_level(t, run, quietly ? RELEASE_LEFT_QUIETLY : RELEASE_LEFT, LP_NO_PAGE, look);
	atomic_thread_fence(memory_order_seq_cst); /* with that of leave_fault: it sees the commit, or we its fault */
	if (quietly && atomic_load(&t->times_left) != times_left)
		wake(t, run->addr, run->nr_pages);
	if (!rc)
		trace_took(t, begun, LP_TRACE_BROUGHT, trace_source(run->source), run->addr, run->nr_pages);
	return rc;
}

/* Where one thread of the background is, and how far it goes on from there. */
struct stripe {
	uint64_t at, end;
	uint32_t sent;
	struct lp_look look;
	struct {
		uint32_t level; /* whose bytes [from, to) are mapped */
		uint64_t from, to;
	} mapped[MAPPED]; /* by level: a chain's may take turns page by page */
};

/*
 * Maps what is copied next, and reads it from the disk: with no lock held, for which a fault would wait.  A copy that finds a
 * page not mapped begins twice (mm/userfaultfd.c, mfill_atomic).  No error matters, the copy will meet it.
 */
static void map_ahead(const struct lp_task *t, struct stripe *s, const struct lp_answer *run)
{
	const struct lp_level *level = &t->levels[run->source];
	uint64_t left = level->size - run->offset, size = left < STRIPE ? left : STRIPE;
	uint32_t i = run->source % MAPPED;

	s->mapped[i].level = run->source;
	s->mapped[i].from = run->offset;
	s->mapped[i].to = run->offset + size;
	madvise((char *)(uintptr_t)level->base + (run->offset & ~(LP_PAGE_SIZE - 1)), size, MADV_POPULATE_READ);
}

static bool is_mapped(const struct stripe *s, const struct lp_answer *run)
{
	uint32_t i = run->source % MAPPED;

	return run->source == s->mapped[i].level && run->offset >= s->mapped[i].from && run->offset < s->mapped[i].to;
}

/* The next run of this thread's pages, in a new stripe if need be (lock held shared). False when nothing waits behind the cursor. */
static bool next_run(struct lp_task *t, struct stripe *s, uint64_t max_pages, struct lp_answer *run)
{
	if (s->at < s->end && s->sent == atomic_load(&t->sent) && lp_space_next(t->space, s->at, max_pages, false, run) &&
	    run->addr < s->end)
		goto out;
	for (;;) {
		uint64_t cursor;

		s->sent = atomic_load(&t->sent);
		cursor = atomic_load(&t->cursor);
		if (!lp_space_next(t->space, cursor, max_pages, false, run)) {
			atomic_compare_exchange_strong(&t->cursor, &cursor, 0);
			return false;
		}
		s->end = (run->addr | (STRIPE - 1)) + 1;
		if (atomic_compare_exchange_strong(&t->cursor, &cursor, s->end))
			break;
	}
out:
	if (run->nr_pages > (s->end - run->addr) >> LP_PAGE_SHIFT)
		run->nr_pages = (s->end - run->addr) >> LP_PAGE_SHIFT;
	return true;
}

/* The turn is over before the stripe: the next one goes on there, unless another has taken one behind it. */
static void leave(struct lp_task *t, const struct stripe *s)
{
	uint64_t end = s->end;

	if (s->at < end && s->sent == atomic_load(&t->sent))
		atomic_compare_exchange_strong(&t->cursor, &end, s->at);
}

int64_t lp_task_transfer(struct lp_task *t, uint64_t max_bytes)
{
	uint64_t brought = 0;
	struct stripe stripe = {0};
	bool occupies = false;
	struct lp_aside aside;
	int rc = 0;

	lp_aside_begin(&aside, &t->engine->follow);
	for (int turned = 0, tries = 0, waits = 0; brought < max_bytes && !rc;) {
		uint64_t now = now_ns(), quiet = now - atomic_load_explicit(&t->engine->last_fault, memory_order_relaxed);
		bool changing = now - atomic_load_explicit(&t->last_change, memory_order_relaxed) < CHANGING_NS;
		uint64_t most = chunk(t->engine);
		bool unmapped = false;
		struct lp_answer run;

		if (most > max_bytes - brought)
			most = (max_bytes - brought + LP_PAGE_SIZE - 1) & ~(LP_PAGE_SIZE - 1);
		if (!lp_aside_look(&aside, &t->engine->follow, quiet < ASIDE_NS)) {
			const struct timespec pause = {.tv_nsec = ASIDE_NS};

			/* the place is taken: a second one there would only be in the way */
			if (++waits == ASIDE_TRIES)
				rc = -EAGAIN;
			nanosleep(&pause, NULL);
			continue;
		}
		if (changing) {
			const struct timespec pause = {.tv_nsec = CHANGING_PAUSE_NS}, turn = {.tv_nsec = RETRY_MOST_NS};

			if (!occupies && atomic_exchange(&t->occupied, true)) {
				nanosleep(&turn, NULL);
				continue;
			}
			occupies = true;
			nanosleep(&pause, NULL);
		} else if (occupies) {
			atomic_store(&t->occupied, false);
			occupies = false;
		}
		lp_lock_shared(&t->lock);
		if (!is_served(t) || atomic_load(&t->gone)) {
			rc = -ESRCH;
		} else if (t->nr_changes) {
			rc = -EAGAIN;
		} else if (!next_run(t, &stripe, most >> LP_PAGE_SHIFT, &run)) {
			/* round again once: what was released behind us */
			if (turned++)
				rc = 1;
		} else if (!is_mapped(&stripe, &run)) {
			stripe.at = run.addr;
			unmapped = true;
		} else {
			stripe.at = run.addr + (run.nr_pages << LP_PAGE_SHIFT);
			rc = bring_run(t, &run, &stripe.look);
			brought += run.nr_pages << LP_PAGE_SHIFT;
			if (!run.nr_pages && ++tries > LOOKAHEAD_TRIES)
				rc = 1;
		}
		lp_unlock_shared(&t->lock);
		if (unmapped)
			map_ahead(t, &stripe, &run);
	}
	leave(t, &stripe);
	if (occupies)
		atomic_store(&t->occupied, false);
	lp_aside_end(&aside, &t->engine->follow);
	if (rc < 0 && !(rc == -EAGAIN && brought))
		return rc;
	return (int64_t)brought;
}

int lp_task_bring(struct lp_task *t, uint64_t start, uint64_t end)
{
	struct lp_answer run;
	int rc = 0;

	lp_lock_shared(&t->lock);
	if (!is_served(t) || atomic_load(&t->gone))
		rc = -ESRCH;
	else if (t->nr_changes)
		rc = -EAGAIN;
	for (uint64_t at = start; at < end && !rc; at += run.nr_pages << LP_PAGE_SHIFT) {
		uint64_t claimed;

		run = lp_space_lookup(t->space, at, (end - at) >> LP_PAGE_SHIFT);
		if (run.kind != LP_DATA && run.kind != LP_REMOTE)
			continue;
		claimed = lp_space_claim(t->space, run.dense, run.nr_pages);
		run.nr_pages = claimed ? claimed : 1;
		if (!claimed)
			continue; /* somebody was faster */
		if (run.kind == LP_DATA) {
			uint64_t begun = trace_begins(t);

			rc = copy_level(t, &run, RELEASE_LEFT, LP_NO_PAGE, NULL);
			if (!rc)
				trace_took(t, begun, LP_TRACE_BROUGHT, trace_source(run.source), run.addr, run.nr_pages);
		} else {
			trace(t, LP_TRACE_FETCHED, LP_TRACE_REMOTE, run.addr, run.nr_pages, run.image);
			if (!notify(t->engine, (struct lp_notice){.kind = LP_NOTICE_NEED,
								  .task = t,
								  .addr = run.addr,
								  .image = run.image,
								  .nr_pages = run.nr_pages}))
				lp_space_release(t->space, run.dense, run.nr_pages);
		}
	}
	lp_unlock_shared(&t->lock);
	return rc;
}

uint64_t lp_task_claim_remote(struct lp_task *t, uint64_t cursor, uint64_t max_pages, uint64_t *image,
			      uint64_t *next_cursor)
{
	struct lp_answer run;
	uint64_t nr = 0;

	lp_lock_shared(&t->lock);
	while (is_served(t) && lp_space_next(t->space, cursor, max_pages, true, &run)) {
		cursor = run.addr + (run.nr_pages << LP_PAGE_SHIFT);
		if ((nr = lp_space_claim(t->space, run.dense, run.nr_pages)))
			break;
	}
	if (nr) {
		trace(t, LP_TRACE_FETCHED, LP_TRACE_REMOTE, run.addr, nr, run.image);
		*image = run.image;
		*next_cursor = run.addr + (nr << LP_PAGE_SHIFT);
	}
	lp_unlock_shared(&t->lock);
	return nr;
}

int64_t lp_task_claim_background(struct lp_task *t, uint64_t max_pages, uint64_t *image)
{
	uint64_t from = t->channel_cursor, nr = 0;
	int64_t rc = 0;

	lp_lock_shared(&t->lock);
	if (atomic_load(&t->gone) || !is_served(t))
		rc = -ESRCH;
	else if (t->nr_changes) /* none is added but by this thread; who closes the task makes them */
		rc = -EAGAIN;
	lp_unlock_shared(&t->lock);
	if (rc)
		return rc == -EAGAIN ? rc : 0;
	nr = lp_task_claim_remote(t, from, max_pages, image, &t->channel_cursor);
	if (!nr && from) /* round again: what was released behind us */
		nr = lp_task_claim_remote(t, 0, max_pages, image, &t->channel_cursor);
	return (int64_t)nr;
}

/* The next piece of image range [image, +nr_pages) that a region holds; its answer starts where the task has it now. */
static bool next_piece(const struct lp_task *t, uint64_t *image, uint64_t end, bool unasked, struct lp_answer *piece)
{
	uint64_t addr;

	for (; *image < end; *image += LP_PAGE_SIZE) {
		if (!lp_space_locate(t->space, *image, &addr))
			continue;
		*piece = lp_space_lookup(t->space, addr, (end - *image) >> LP_PAGE_SHIFT);
		if (piece->kind == LP_CLAIMED)
			return true;
		/* nobody has asked for these yet: good to have all the same (only deliver does so) */
		if (piece->kind == LP_REMOTE && unasked &&
		    (piece->nr_pages = lp_space_claim(t->space, piece->dense, piece->nr_pages)))
			return true;
	}
	return false;
}

int64_t lp_task_deliver(struct lp_task *t, uint64_t image, uint64_t nr_pages, const void *buffer)
{
	uint64_t at = image, end = image + (nr_pages << LP_PAGE_SHIFT), placed = 0;
	struct lp_answer piece;
	int rc = 0;

	lp_lock_shared(&t->lock);
	if (!is_served(t))
		rc = -ESRCH;
	else if (t->nr_changes)
		rc = -EAGAIN;
	while (!rc && next_piece(t, &at, end, true, &piece)) {
		uint64_t begun = trace_begins(t);

		rc = copy_run(t, &piece, (const char *)buffer + (at - image), KEEP_CLAIMS);
		if (!rc)
			trace_took(t, begun, LP_TRACE_ARRIVED, LP_TRACE_REMOTE, piece.addr, piece.nr_pages);
		placed += piece.nr_pages;
		at += piece.nr_pages << LP_PAGE_SHIFT;
	}
	lp_unlock_shared(&t->lock);
	if (!rc)
		end_wait(t, image, end, true);
	return rc ? rc : (int64_t)placed;
}

void lp_task_fail_remote(struct lp_task *t, uint64_t image, uint64_t nr_pages, bool lost)
{
	uint64_t at = image, end = image + (nr_pages << LP_PAGE_SHIFT);
	struct lp_answer piece;

	lp_lock_shared(&t->lock);
	while (t->uffd >= 0 && next_piece(t, &at, end, false, &piece)) {
		if (lost) {
			lose(t, &piece, 0, piece.nr_pages, ENODATA);
		} else {
			lp_space_release(t->space, piece.dense, piece.nr_pages);
			wake(t, piece.addr, piece.nr_pages);
		}
		at += piece.nr_pages << LP_PAGE_SHIFT;
	}
	lp_unlock_shared(&t->lock);
	end_wait(t, image, end, false);
}

void lp_task_regain(struct lp_task *t)
{
	lp_lock_alone(&t->lock);
	if (t->uffd >= 0 && lp_space_regain(t->space))
		for (size_t r = 0; r < lp_space_nr_regions(t->space); r++) {
			const struct lp_region *region = &lp_space_regions(t->space)[r];

			wake(t, region->start, (region->end - region->start) >> LP_PAGE_SHIFT);
		}
	lp_unlock_alone(&t->lock);
}

/*
 * One range; pages that are there already count as done.  So do those that are not registered, for nothing can be done about
 * them; the owner is told. Returns pages settled or -errno.
 */
static int64_t poison_range(struct lp_task *t, const struct lp_answer *run)
{
	uint64_t done = 0, step = run->nr_pages;

	while (done < run->nr_pages) {
		uint64_t addr = run->addr + (done << LP_PAGE_SHIFT), left = run->nr_pages - done, nr = 1;
		struct uffdio_poison poison = {
			.range = {.start = addr, .len = (step < left ? step : left) << LP_PAGE_SHIFT}};
		int error = 0;

		if (ioctl(t->uffd, UFFDIO_POISON, &poison))
			error = poison.updated < 0 ? (int)-poison.updated : errno;
		if (poison.updated > 0) {
			nr = (uint64_t)poison.updated >> LP_PAGE_SHIFT;
			add(&t->stats.poisoned, nr);
			trace(t, LP_TRACE_POISONED, trace_source(run->source), addr, nr, 0);
			if (!error)
				step *= 2;
		} else if (error == ENOENT && poison.range.len > LP_PAGE_SIZE) {
			/* more than one VMA */
			step = (poison.range.len >> LP_PAGE_SHIFT) / 2;
			continue;
		} else if (error == ENOENT) {
			if (try_page(t, addr) == EAGAIN)
				return -EAGAIN;
			if (run->kind != LP_LOST)
				lose(t, run, done, 1, ENOENT);
		} else if (error == EEXIST) {
			wake(t, addr, 1);
		} else if (error == ENOMEM || error == EINTR) {
			return -EAGAIN;
		} else {
			if (lp_means_gone(error))
				is_gone(t);
			return -error;
		}
		lp_space_commit(t->space, run->dense + done, nr);
		done += nr;
	}
	return (int64_t)done;
}

int64_t lp_task_poison(struct lp_task *t, bool all)
{
	int64_t total = 0, rc = 0;

	lp_lock_alone(&t->lock);
	if (t->uffd >= 0 && atomic_load(&t->broken))
		rc = -ESRCH; /* nobody knows what there is to poison */
	else if (t->uffd >= 0 && t->nr_changes)
		rc = -EAGAIN; /* what is lost may be elsewhere by now */
	for (size_t r = 0; t->uffd >= 0 && rc >= 0 && r < lp_space_nr_regions(t->space); r++) {
		struct lp_region region = lp_space_regions(t->space)[r];

		while (region.start < region.end) {
			struct lp_answer run = lp_space_lookup(t->space, region.start,
							       (region.end - region.start) >> LP_PAGE_SHIFT);

			region.start += run.nr_pages << LP_PAGE_SHIFT;
			if (run.kind == LP_ZERO || (!all && run.kind != LP_LOST))
				continue;
			rc = poison_range(t, &run);
			if (rc < 0)
				break;
			total += rc;
		}
	}
	check_complete(t);
	lp_unlock_alone(&t->lock);
	return rc < 0 ? rc : total;
}

void lp_task_forget(struct lp_task *t, uint64_t image, uint64_t nr_pages)
{
	struct lp_counts dropped = {.nr_levels = t->nr_levels};
	uint64_t addr;

	dropped.by_source = calloc(t->nr_levels + 2, sizeof(uint64_t));
	if (!dropped.by_source)
		return; /* they stay lost: the task waits */
	lp_lock_alone(&t->lock);
	lp_space_forget(t->space, image, nr_pages, &dropped);
	drop_into(t, dropped.by_source);
	lp_space_index(t->space);
	for (uint64_t i = 0; t->uffd >= 0 && i < nr_pages; i++)
		if (lp_space_locate(t->space, image + (i << LP_PAGE_SHIFT), &addr))
			wake(t, addr, 1);
	check_complete(t);
	lp_unlock_alone(&t->lock);
	free(dropped.by_source);
}

int lp_task_probe(struct lp_task *t)
{
	int error;

	/* alone: what has just arrived is accounted for before its task is found gone */
	lp_lock_alone(&t->lock);
	error = t->uffd < 0 ? ESRCH : try_page(t, LP_ANYWHERE);
	if (lp_means_gone(error)) {
		is_gone(t);
		error = ESRCH;
	} else if (error != EAGAIN) {
		error = 0;
	}
	lp_unlock_alone(&t->lock);
	return -error;
}

/* ---- what there is to know ---- */

uint64_t lp_task_tag(const struct lp_task *t)
{
	return t->tag;
}

uint32_t lp_task_nr_levels(const struct lp_task *t)
{
	return t->nr_levels;
}

uint64_t lp_task_total(const struct lp_task *t)
{
	return t->total;
}

uint64_t lp_task_pending(const struct lp_task *t)
{
	return lp_space_pending(t->space);
}

uint64_t lp_task_lost(const struct lp_task *t)
{
	return lp_space_lost(t->space);
}

void lp_task_stats(const struct lp_task *t, struct lp_stats *stats)
{
#define GET(name) stats->name = atomic_load_explicit(&t->stats.name, memory_order_relaxed)
	GET(faults);
	GET(faults_zero);
	GET(faults_served);
	GET(retried);
	GET(zero_pages);
	GET(present);
	GET(copies);
	GET(reads);
	GET(wakes);
	GET(poisoned);
	GET(forks);
	GET(remaps);
	GET(removes);
	GET(unmaps);
	GET(service_max);
#undef GET
}

void lp_task_sources(const struct lp_task *t, uint64_t *copied, uint64_t *dropped, uint64_t *faults)
{
	for (uint32_t i = 0; i < t->nr_levels + 2; i++) {
		copied[i] = atomic_load_explicit(&t->copied[i], memory_order_relaxed);
		dropped[i] = atomic_load_explicit(&t->dropped[i], memory_order_relaxed);
		faults[i] = atomic_load_explicit(&t->served[i], memory_order_relaxed);
	}
}

void lp_task_remaining(struct lp_task *t, uint64_t *by_source)
{
	struct lp_counts counts = {by_source, t->nr_levels};

	memset(by_source, 0, (t->nr_levels + 2) * sizeof(*by_source));
	lp_lock_shared(&t->lock);
	lp_space_count(t->space, &counts);
	lp_unlock_shared(&t->lock);
}

void lp_task_histogram(const struct lp_task *t, uint64_t buckets[LP_HISTOGRAM_BUCKETS])
{
	for (uint32_t i = 0; i < LP_HISTOGRAM_BUCKETS; i++)
		buckets[i] = atomic_load_explicit(&t->histogram[i], memory_order_relaxed);
}

const struct lp_space *lp_task_space(const struct lp_task *t)
{
	return t->space;
}
