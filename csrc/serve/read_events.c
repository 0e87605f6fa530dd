#include "read_events.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "calls.h"
#include "common/clock.h"
#include "deferred.h"
#include "events.h"
#include "late.h"
#include "task_trace.h"
#include "wiped.h"

#define ALONE_MOST 16 /* messages read one by one before other tasks have their turn */
#define BEHIND_MOST 1024 /* the same, if an error may be behind them */
#define MESSAGES 128 /* of one read */
#define LATE_NS (2 * LP_NS)	/* longest wait for a late event; its thread may hardly ever get a CPU */
#define LATE_LOOK_NS 100000 /* between two checks for a late thread, but at least four times the duration of a check */

bool lp_try_append_change(struct lp_task *t, struct lp_change change)
{
	if (t->nr_changes == t->cap_changes) {
		size_t cap = t->cap_changes ? t->cap_changes * 2 : 16;
		struct lp_change *changes = realloc(t->changes, cap * sizeof(*changes));

		if (!changes)
			return false;
		t->changes = changes;
		t->cap_changes = cap;
	}
	t->changes[t->nr_changes++] = change;
	return true;
}

void lp_append_change(struct lp_task *t, struct lp_change change)
{
	if (!lp_try_append_change(t, change))
		lp_mark_broken(t, ENOMEM);
}

static void keep_change(struct lp_task *t, const struct uffd_msg *msg)
{
	struct lp_change change = {0};

	switch (msg->event) {
	case UFFD_EVENT_FORK:
		change = (struct lp_change){.kind = LP_FORKED, .uffd = (int)msg->arg.fork.ufd, .to = t->reported++,
					    .seen = lp_look_at_wiped(t)};
		break;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		change.kind = msg->event == UFFD_EVENT_REMOVE ? LP_REMOVED : LP_UNMAPPED;
		change.start = msg->arg.remove.start;
		change.len = msg->arg.remove.end - msg->arg.remove.start;
		change.to = t->reported++;
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
		lp_post_about(t, LP_EVENT_FAILED, EPROTO);
		return;
	}
	t->changes[t->nr_changes++] = change; /* there is room: reserve_messages */
}

void lp_watch(struct lp_task *t, bool listen)
{
	struct epoll_event event = {.events = listen ? EPOLLIN : 0, .data.ptr = t};

	epoll_ctl(t->engine->epfd, EPOLL_CTL_MOD, t->uffd, &event);
}

/* Handles a failed read, such as no free fd for the uffd of a forked child, or no memory: the task waits for the next try. */
static void read_failed(struct lp_task *t, int error)
{
	if (!t->read_error && !t->unreported_lost) /* a child that is not linked reports it when it is read again */
		lp_post_about(t, LP_EVENT_FAILED, error);
	lp_watch(t, false); /* it stays readable */
	t->read_error = error;
	t->next_try = lp_now_ns() + LP_READ_RETRY_NS;
}

static void read_succeeded(struct lp_task *t)
{
	if (t->read_error)
		lp_watch(t, true);
	t->read_error = 0;
}

static void read_later(struct lp_task *t, uint64_t pause)
{
	lp_watch(t, false);
	t->read_error = EBUSY;
	t->next_try = lp_now_ns() + pause;
}

/*
 * Whether one of the changes from `first` on shows that the event of a departure is late (csrc/serve/late.h).  The other threads
 * stay blocked until more is read.  So once the late thread waits for its event to be read, that event precedes their next ones.
 */
static bool departure_is_late(struct lp_task *t, size_t first)
{
	if (!t->pid)
		return false;
	for (size_t i = t->nr_changes; i-- > first;) {
		if (t->changes[i].kind != LP_REMAPPED ||
		    !lp_departure_is_late(t->space, t->changes, t->nr_changes, i, &t->late))
			continue;
		t->late_until = lp_now_ns() + LATE_NS;
		read_later(t, 0);
		return true;
	}
	return false;
}

/* Whether all events of the mremap of change i were read: its thread may have continued, and unmapped what it has moved. */
static bool has_returned(const struct lp_task *t, size_t i)
{
	for (size_t k = i + 1; k < t->nr_changes; k++)
		if (t->changes[k].kind == LP_UNMAPPED && t->changes[k].start == t->changes[i].start)
			return true; /* whatever its length: kernels before about 6.15 may have reported that of the move wrongly */
	return false;
}

/* Whether to wait longer for a late event: its thread does not wait for a reader yet. */
static bool is_still_late(struct lp_task *t)
{
	uint64_t before = lp_now_ns(), after;
	int rc = lp_reports_departure(t->pid, t->pidfd, t->late.start, t->late.end);

	after = lp_now_ns();
	if (!rc && after < t->late_until) {
		read_later(t, LATE_LOOK_NS > 4 * (after - before) ? LATE_LOOK_NS : 4 * (after - before));
		return true;
	}
	for (size_t i = t->nr_changes; i-- && rc == 1;)
		if (t->changes[i].kind == LP_REMAPPED && t->changes[i].to == t->late.start) {
			t->changes[i].awaited = !has_returned(t, i);
			break;
		}
	t->late_until = 0;
	read_succeeded(t);
	return false;
}

/* Makes room for the messages of one read, so that no message is lost for lack of memory. */
static bool reserve_messages(struct lp_task *t)
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

bool lp_read_events(struct lp_task *t)
{
	struct uffd_msg msgs[MESSAGES];
	uint64_t now = 0;
	size_t first, want, taken = 0;
	bool late = false, alone, more = false;
	int error = 0;
	ssize_t n;

	if (t->late_until && is_still_late(t))
		return false;
	do {
		first = t->nr_changes;
		alone = t->changes_layout;
		want = (alone ? 1 : MESSAGES) * sizeof(*msgs);
		if (!reserve_messages(t)) {
			error = ENOMEM;
			break;
		}
		lp_count(&t->stats.reads, 1);
		n = read(t->uffd, msgs, want);
		if (n < 0) {
			error = errno == EINTR || errno == EAGAIN ? 0 : errno;
			if (errno == EINTR)
				continue;
			break;
		}
		taken += (size_t)n / sizeof(*msgs);
		for (size_t i = 0; i < (size_t)n / sizeof(*msgs); i++) {
			uint64_t addr = msgs[i].arg.pagefault.address & ~(LP_PAGE_SIZE - 1);

			if (msgs[i].event != UFFD_EVENT_PAGEFAULT) {
				keep_change(t, &msgs[i]);
				t->changes_layout |= msgs[i].event == UFFD_EVENT_REMAP || msgs[i].event == UFFD_EVENT_UNMAP;
				continue;
			}
			if (!now)
				now = lp_now_ns();
			lp_count(&t->stats.faults, 1);
			if (t->engine->trace)
				lp_task_trace_at(t, now, LP_TRACE_FAULT, LP_TRACE_NO_SOURCE, addr, 1, 0, 0);
			lp_faults_push(&t->faults, (struct lp_fault){.addr = addr, .since = now, .times = 1});
		}
		late = departure_is_late(t, first);
		/* A read that returned faults hides an error of the event behind them (fs/userfaultfd.c, userfaultfd_read). */
		/* Threads that change the layout without a pause must not keep this thread from other tasks. */
		more = alone && taken >= (t->read_error ? BEHIND_MOST : ALONE_MOST);
	} while (!late && !more && (n < 0 || (size_t)n == want || t->read_error));
	if (now)
		atomic_store_explicit(&t->engine->last_fault, now, memory_order_relaxed);
	if (t->nr_changes)
		atomic_store_explicit(&t->last_change, lp_now_ns(), memory_order_relaxed);
	if (error)
		read_failed(t, error);
	else if (!late && !more)
		read_succeeded(t);
	return !error && !late && !more;
}
