#define _GNU_SOURCE
#include "trace.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/clock.h"

#define BATCH 1024	     /* records for one write(2) */
#define PAUSE_MS 20	     /* between two looks at the ring: what a daemon that is killed has not written, at most */
#define LINE 64		     /* bytes of a cache line: threads that put records do not meet in one */

/*
 * A slot is free for the record number `turn`, or holds record number `turn - 1`: a bounded queue for many producers as
 * described by D. Vyukov, where each slot says itself whose turn it is.
 */
struct slot {
	_Atomic uint64_t turn;
	struct lp_trace_record record;
} __attribute__((aligned(LINE)));

struct lp_trace {
	struct slot *slots;
	size_t mask;
	_Alignas(LINE) _Atomic uint64_t head; /* number of the next record */
	_Alignas(LINE) _Atomic uint64_t dropped;
	_Atomic uint64_t written;
	int stopfd; /* readable: to be stopped */
	uint64_t tail;		/* the draining thread's, as is what follows */
	uint64_t told_dropped;
	struct lp_trace_record batch[BATCH];
};

struct lp_trace *lp_trace_new(size_t records)
{
	struct lp_trace *trace = aligned_alloc(LINE, (sizeof(*trace) + LINE - 1) / LINE * LINE);

	if (!trace)
		return NULL;
	memset(trace, 0, sizeof(*trace));
	trace->mask = records - 1;
	trace->stopfd = eventfd(0, EFD_CLOEXEC);
	trace->slots = aligned_alloc(LINE, records * sizeof(*trace->slots));
	if (!trace->slots || trace->stopfd < 0) {
		int saved = errno;

		lp_trace_free(trace);
		errno = saved;
		return NULL;
	}
	/* touched here, once: no fault of a task waits for memory of ours */
	memset(trace->slots, 0, records * sizeof(*trace->slots));
	for (size_t i = 0; i < records; i++)
		atomic_init(&trace->slots[i].turn, i);
	return trace;
}

void lp_trace_free(struct lp_trace *trace)
{
	if (!trace)
		return;
	if (trace->stopfd >= 0)
		close(trace->stopfd);
	free(trace->slots);
	free(trace);
}

bool lp_trace_put(struct lp_trace *trace, const struct lp_trace_record *record)
{
	uint64_t at = atomic_load_explicit(&trace->head, memory_order_relaxed);

	for (;;) {
		struct slot *slot = &trace->slots[at & trace->mask];
		int64_t ahead = (int64_t)(atomic_load_explicit(&slot->turn, memory_order_acquire) - at);

		if (ahead < 0) { /* it still holds a record of the last time round */
			atomic_fetch_add_explicit(&trace->dropped, 1, memory_order_relaxed);
			return false;
		}
		if (ahead > 0) { /* another thread has taken it */
			at = atomic_load_explicit(&trace->head, memory_order_relaxed);
			continue;
		}
		if (!atomic_compare_exchange_weak_explicit(&trace->head, &at, at + 1, memory_order_relaxed,
							   memory_order_relaxed))
			continue;
		slot->record = *record;
		atomic_store_explicit(&slot->turn, at + 1, memory_order_release);
		return true;
	}
}

/* The next records, in order, at most `max` of them. */
static size_t take(struct lp_trace *trace, struct lp_trace_record *records, size_t max)
{
	size_t nr = 0;

	while (nr < max) {
		struct slot *slot = &trace->slots[trace->tail & trace->mask];

		if (atomic_load_explicit(&slot->turn, memory_order_acquire) != trace->tail + 1)
			break;
		records[nr++] = slot->record;
		atomic_store_explicit(&slot->turn, trace->tail + trace->mask + 1, memory_order_release);
		trace->tail++;
	}
	return nr;
}

static int write_all(int fd, const void *data, size_t size)
{
	const char *at = data;

	while (size) {
		ssize_t n = write(fd, at, size);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0) {
			at += n;
			size -= (size_t)n;
		}
	}
	return 0;
}

int64_t lp_trace_drain(struct lp_trace *trace, int fd)
{
	/* no more than was there when we came: threads that put faster than we write can't keep us here */
	uint64_t end = atomic_load_explicit(&trace->head, memory_order_acquire);
	int64_t total = 0;

	for (;;) {
		size_t left = end > trace->tail ? (size_t)(end - trace->tail) : 0, nr, taken;
		uint64_t dropped = atomic_load_explicit(&trace->dropped, memory_order_relaxed);
		int rc;

		nr = taken = take(trace, trace->batch, left < BATCH - 1 ? left : BATCH - 1);
		if (dropped != trace->told_dropped) {
			trace->batch[nr++] = (struct lp_trace_record){
				.time = lp_now_ns(), .kind = LP_TRACE_DROPPED, .source = LP_TRACE_NO_SOURCE, .pages = dropped};
			trace->told_dropped = dropped;
		}
		if (!nr)
			return total;
		rc = write_all(fd, trace->batch, nr * sizeof(*trace->batch));
		if (rc) {
			atomic_fetch_add_explicit(&trace->dropped, taken, memory_order_relaxed);
			return rc;
		}
		atomic_fetch_add_explicit(&trace->written, taken, memory_order_relaxed);
		total += (int64_t)taken;
	}
}

int lp_trace_run(struct lp_trace *trace, int fd)
{
	const struct sched_param none = {0};
	struct lp_trace_record end = {.kind = LP_TRACE_END, .source = LP_TRACE_NO_SOURCE};
	struct pollfd stop = {.fd = trace->stopfd, .events = POLLIN};
	bool last;

	/* Awake, it does not take the CPU from a thread that holds what a fault waits for (sched(7)). */
	sched_setscheduler(0, SCHED_BATCH, &none);
	do {
		int64_t rc;

		last = poll(&stop, 1, PAUSE_MS) > 0;
		rc = lp_trace_drain(trace, fd);
		if (rc < 0)
			return (int)rc;
	} while (!last);
	end.time = lp_now_ns();
	end.pages = lp_trace_dropped(trace);
	return write_all(fd, &end, sizeof(end));
}

void lp_trace_stop(struct lp_trace *trace)
{
	eventfd_write(trace->stopfd, 1);
}

uint64_t lp_trace_written(const struct lp_trace *trace)
{
	return atomic_load_explicit(&trace->written, memory_order_relaxed);
}

uint64_t lp_trace_dropped(const struct lp_trace *trace)
{
	return atomic_load_explicit(&trace->dropped, memory_order_relaxed);
}
