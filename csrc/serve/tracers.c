#define _GNU_SOURCE
#include "tracers.h"

#include <errno.h>
#include <linux/cn_proc.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proc_connector.h"
#include "wakeup_fd.h"

/* Pids end here at the latest: PID_MAX_LIMIT, proc_sys_kernel(5). A bit each; what is not touched takes no memory. */
#define PIDS (UINT32_C(1) << 22)

/* Of the thread that holds tracers: another daemon on this machine knows it by this. */
#define NAME "uffd-tracers"
#define NAME_MAX_SIZE 16 /* TASK_COMM_LEN */

enum { HELD_MORE = 16, RETAKE_MS = 1 };

struct held {
	int32_t tracer;
	int32_t signal; /* it was about to get this one */
	uint32_t times;
	bool by_another; /* a daemon has stopped it, too: it is ours as soon as that one lets it go */
	struct lp_attach first; /* by which it came here */
};

/* A growing array under the lock. */
struct queue {
	struct lp_attach *items;
	size_t nr, cap;
};

/* A watch of inotify on /proc/PID; its number is the index. */
struct look {
	int32_t pid; /* 0: none */
	int32_t tracer; /* its tracer at the last look */
};

struct lp_tracers {
	int connector; /* -1: the kernel does not report to us */
	int inotify; /* -1: not needed, or not to be had */
	struct look *looks; /* under the lock */
	size_t nr_looks;
	int wake, event;
	atomic_bool stopped;
	_Atomic uint64_t *watched;
	pthread_mutex_t lock;
	struct queue orders; /* pid 0: release the tracer; else hold it */
	struct queue reported;
	struct held *held; /* of the thread of lp_tracers_run */
	size_t nr_held, cap_held;
};

/* False without memory: then the tracer is not held, or not reported, or never let go; the caller sees to it. */
static bool push(struct lp_tracers *t, struct queue *queue, struct lp_attach item)
{
	bool there;

	pthread_mutex_lock(&t->lock);
	if (queue->nr == queue->cap) {
		size_t cap = queue->cap ? queue->cap * 2 : 64;
		struct lp_attach *more = realloc(queue->items, cap * sizeof(*more));

		if (more) {
			queue->items = more;
			queue->cap = cap;
		}
	}
	there = queue->nr < queue->cap;
	if (there)
		queue->items[queue->nr++] = item;
	pthread_mutex_unlock(&t->lock);
	return there;
}

static size_t pop(struct lp_tracers *t, struct queue *queue, struct lp_attach *items, size_t max)
{
	size_t nr;

	pthread_mutex_lock(&t->lock);
	nr = queue->nr < max ? queue->nr : max;
	if (nr) {
		memcpy(items, queue->items, nr * sizeof(*items));
		queue->nr -= nr;
		memmove(queue->items, queue->items + nr, queue->nr * sizeof(*items));
	}
	pthread_mutex_unlock(&t->lock);
	return nr;
}

static struct held *find(struct lp_tracers *t, int32_t tracer)
{
	for (size_t i = 0; i < t->nr_held; i++)
		if (t->held[i].tracer == tracer)
			return &t->held[i];
	return NULL;
}

/* A number in a status file of /proc, 0 if it can't be had.  name: with its colon. */
static int32_t status_number(const char *path, const char *name)
{
	size_t length = strlen(name);
	int32_t number = 0;
	char line[256];
	FILE *file = fopen(path, "re");

	while (file && fgets(line, sizeof(line), file)) {
		if (!strncmp(line, name, length)) {
			number = atoi(line + length);
			break;
		}
	}
	if (file)
		fclose(file);
	return number;
}

/*
 * Whether this thread is of another daemon, and holds tracers, as we do.  To hold it would make it hold us in return, for ever; and
 * it reads no memory.
 */
static bool is_holder(int32_t thread)
{
	char path[64], name[NAME_MAX_SIZE + 1] = "";
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/comm", thread);
	file = fopen(path, "re");
	if (!file)
		return false;
	if (!fgets(name, sizeof(name), file))
		name[0] = 0;
	fclose(file);
	return !strcmp(name, NAME "\n");
}

/* Stops it: 0 or an errno; EBUSY: another daemon has.  signal: which it was about to get. */
static int stop_tracer(int32_t tracer, int32_t *signal)
{
	char path[64];
	int status = 0;

	snprintf(path, sizeof(path), "/proc/%d/status", tracer);
	while (ptrace(PTRACE_SEIZE, tracer, NULL, NULL) < 0) {
		int error = errno, other = error == EPERM ? status_number(path, "TracerPid:") : 0;

		if (error != EPERM || (other && !is_holder(other)))
			return error;
		if (other)
			return EBUSY;
		/* let go meanwhile, or we may not; EPERM again then */
		if (ptrace(PTRACE_SEIZE, tracer, NULL, NULL) == 0)
			break;
		if (!status_number(path, "TracerPid:"))
			return EPERM;
	}
	if (ptrace(PTRACE_INTERRUPT, tracer, NULL, NULL) < 0 || waitpid(tracer, &status, __WALL) < 0 || !WIFSTOPPED(status))
		return ESRCH; /* it is dying */
	*signal = status >> 16 == PTRACE_EVENT_STOP ? 0 : WSTOPSIG(status);
	return 0;
}

/* 0 or an errno. */
static int hold(struct lp_tracers *t, struct lp_attach attach)
{
	int32_t tracer = attach.tracer, signal = 0;
	struct held *held = find(t, tracer);
	int error;

	if (held) {
		held->times++;
		return 0;
	}
	if (t->nr_held == t->cap_held) {
		held = realloc(t->held, (t->cap_held + HELD_MORE) * sizeof(*held));
		if (!held)
			return ENOMEM;
		t->held = held;
		t->cap_held += HELD_MORE;
	}
	/* we would wait for it as well */
	if (status_number("/proc/self/status", "TracerPid:") == tracer ||
	    status_number("/proc/thread-self/status", "TracerPid:") == tracer)
		return EDEADLK;
	error = stop_tracer(tracer, &signal);
	if (error && error != EBUSY)
		return error;
	t->held[t->nr_held++] = (struct held){
		.tracer = tracer,
		.signal = signal,
		.times = 1,
		.by_another = error == EBUSY,
		.first = attach,
	};
	return 0;
}

static void let_go(struct lp_tracers *t, struct held *held)
{
	if (!held->by_another)
		ptrace(PTRACE_DETACH, held->tracer, NULL, (void *)(uintptr_t)held->signal);
	*held = t->held[--t->nr_held];
}

/* Those that another daemon had: whether there are still such. */
static bool retake(struct lp_tracers *t)
{
	bool any = false;

	for (size_t i = 0; i < t->nr_held;) {
		struct held *held = &t->held[i];
		int error = held->by_another ? stop_tracer(held->tracer, &held->signal) : 0;

		if (error && error != EBUSY) {
			struct lp_attach lost = held->first;

			*held = t->held[--t->nr_held];
			lost.error = error;
			if (error != ESRCH && push(t, &t->reported, lost))
				lp_wakeup(t->event);
			continue;
		}
		held->by_another = error == EBUSY;
		any |= held->by_another;
		i++;
	}
	return any;
}

static void attached(struct lp_tracers *t, struct lp_attach attach)
{
	if (attach.pid && is_holder(attach.tracer))
		return;
	if (attach.pid && !attach.error)
		attach.error = hold(t, attach);
	if (push(t, &t->reported, attach))
		lp_wakeup(t->event);
	else if (!attach.error && attach.pid)
		let_go(t, find(t, attach.tracer)); /* better than for ever */
}

static bool is_watched(struct lp_tracers *t, int32_t pid)
{
	if (atomic_load(&t->watched[0]) & 1) /* all */
		return true;
	return pid > 0 && (uint32_t)pid < PIDS && atomic_load(&t->watched[pid / 64]) >> pid % 64 & 1;
}

static void take_event(struct lp_tracers *t)
{
	struct proc_event event;
	int rc = lp_connector_receive(t->connector, &event);

	if (rc < 0) { /* ENOBUFS: events are lost */
		attached(t, (struct lp_attach){0});
	} else if (rc && event.what == PROC_EVENT_PTRACE && event.event_data.ptrace.tracer_pid) {
		struct lp_attach attach = {
			.pid = event.event_data.ptrace.process_tgid,
			.tracer = event.event_data.ptrace.tracer_pid,
			.owner = event.event_data.ptrace.tracer_tgid,
		};

		if (attach.owner == getpid())
			return; /* ourselves, holding one */
		if (!is_watched(t, attach.pid))
			attach.error = EAGAIN;
		attached(t, attach);
	}
}

/* What `ps` and `top` open says nothing, and "status" is what we open ourselves. */
static bool is_a_look(const char *name)
{
	static const char *const names[] = {"smaps", "maps", "pagemap", "mem", "task", "fd", "map_files", "auxv"};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (!strcmp(name, names[i]))
			return true;
	return false;
}

static void look(struct lp_tracers *t, int watch)
{
	struct lp_attach attach = {0};
	char path[64];

	pthread_mutex_lock(&t->lock);
	if (watch >= 0 && (size_t)watch < t->nr_looks && t->looks[watch].pid) {
		struct look *at = &t->looks[watch];

		snprintf(path, sizeof(path), "/proc/%d/status", at->pid);
		attach.tracer = status_number(path, "TracerPid:");
		if (attach.tracer && attach.tracer != at->tracer)
			attach.pid = at->pid;
		at->tracer = attach.tracer;
	}
	pthread_mutex_unlock(&t->lock);
	if (!attach.pid)
		return;
	snprintf(path, sizeof(path), "/proc/%d/status", attach.tracer);
	attach.owner = status_number(path, "Tgid:");
	if (attach.owner != getpid())
		attached(t, attach);
}

static void take_looks(struct lp_tracers *t)
{
	char buffer[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
	ssize_t got = read(t->inotify, buffer, sizeof(buffer));

	for (char *at = buffer; got > 0 && at < buffer + got;) {
		const struct inotify_event *event = (const void *)at;

		if (event->mask & IN_Q_OVERFLOW)
			attached(t, (struct lp_attach){0});
		else if (event->len && is_a_look(event->name))
			look(t, event->wd);
		at += sizeof(*event) + event->len;
	}
}

static void watch_looks(struct lp_tracers *t, int32_t pid)
{
	char path[64];
	int watch;

	snprintf(path, sizeof(path), "/proc/%d", pid);
	watch = inotify_add_watch(t->inotify, path, IN_OPEN | IN_ONLYDIR);
	if (watch < 0)
		return;
	pthread_mutex_lock(&t->lock);
	if ((size_t)watch >= t->nr_looks) {
		size_t nr = (size_t)watch * 2 + 64;
		struct look *more = realloc(t->looks, nr * sizeof(*more));

		if (more) {
			memset(more + t->nr_looks, 0, (nr - t->nr_looks) * sizeof(*more));
			t->looks = more;
			t->nr_looks = nr;
		}
	}
	if ((size_t)watch < t->nr_looks) {
		snprintf(path, sizeof(path), "/proc/%d/status", pid);
		t->looks[watch] = (struct look){pid, status_number(path, "TracerPid:")}; /* the restorer may be at it still */
	}
	pthread_mutex_unlock(&t->lock);
}

static void unwatch_looks(struct lp_tracers *t, int32_t pid)
{
	pthread_mutex_lock(&t->lock);
	for (size_t watch = 0; watch < t->nr_looks; watch++) {
		if (t->looks[watch].pid == pid) {
			inotify_rm_watch(t->inotify, (int)watch);
			t->looks[watch].pid = 0;
		}
	}
	pthread_mutex_unlock(&t->lock);
}

static void obey(struct lp_tracers *t)
{
	struct lp_attach order;

	lp_wakeup_clear(t->wake);
	while (pop(t, &t->orders, &order, 1)) {
		struct held *held = find(t, order.tracer);

		if (order.pid)
			attached(t, order);
		else if (held && !--held->times)
			let_go(t, held);
	}
}

int lp_tracers_run(struct lp_tracers *t)
{
	struct pollfd waiting[3] = {
		{.fd = t->wake, .events = POLLIN},
		{.fd = t->connector, .events = POLLIN},
		{.fd = t->inotify, .events = POLLIN},
	};
	struct sched_param now = {.sched_priority = 1}, before = {0};
	int policy = sched_getscheduler(0), rc = 0;
	char name[NAME_MAX_SIZE] = "";
	bool others = false;

	prctl(PR_GET_NAME, name);
	prctl(PR_SET_NAME, NAME);

	/* CRIU reads which pages there are 2.6 ms after its attach (docs/criu.md): no time to wait for a CPU, if that is allowed */
	sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &now);
	while (!atomic_load(&t->stopped)) {
		if (poll(waiting, 3, others ? RETAKE_MS : -1) < 0 && errno != EINTR) {
			rc = -errno;
			break;
		}
		if (waiting[1].revents) /* first: each moment counts */
			take_event(t);
		if (waiting[2].revents)
			take_looks(t);
		if (waiting[0].revents)
			obey(t);
		others = retake(t);
	}
	while (t->nr_held)
		let_go(t, t->held);
	prctl(PR_SET_NAME, name);
	sched_setscheduler(0, policy < 0 ? SCHED_OTHER : policy, &before); /* the thread may be used for something else */
	return rc;
}

struct lp_tracers *lp_tracers_new(void)
{
	struct lp_tracers *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->connector = t->inotify = -1;
	t->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	t->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	t->watched = calloc(PIDS / 64, sizeof(*t->watched));
	pthread_mutex_init(&t->lock, NULL);
	if (t->wake < 0 || t->event < 0 || !t->watched) {
		int error = errno;

		lp_tracers_free(t);
		errno = error;
		return NULL;
	}
	t->connector = lp_connector_open();
	if (t->connector < 0)
		t->inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	return t;
}

void lp_tracers_free(struct lp_tracers *t)
{
	if (t->connector >= 0) {
		/* before Linux 6.6 the kernel goes on making events when a socket is only closed */
		lp_connector_say(t->connector, PROC_CN_MCAST_IGNORE);
		close(t->connector);
	}
	if (t->inotify >= 0)
		close(t->inotify);
	if (t->wake >= 0)
		close(t->wake);
	if (t->event >= 0)
		close(t->event);
	free(t->watched);
	free(t->looks);
	free(t->orders.items);
	free(t->reported.items);
	free(t->held);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

bool lp_tracers_reported(const struct lp_tracers *t)
{
	return t->connector >= 0;
}

void lp_tracers_watch(struct lp_tracers *t, int32_t pid, bool watched)
{
	uint64_t bit = UINT64_C(1) << pid % 64;

	if (pid < 0 || (uint32_t)pid >= PIDS)
		return;
	if (t->inotify >= 0 && pid && watched)
		watch_looks(t, pid);
	else if (t->inotify >= 0 && pid)
		unwatch_looks(t, pid);
	if (watched)
		atomic_fetch_or(&t->watched[pid / 64], bit);
	else
		atomic_fetch_and(&t->watched[pid / 64], ~bit);
}

void lp_tracers_report(struct lp_tracers *t, int32_t pid, int32_t tracer, int32_t owner)
{
	push(t, &t->orders, (struct lp_attach){.pid = pid, .tracer = tracer, .owner = owner});
	lp_wakeup(t->wake);
}

void lp_tracers_release(struct lp_tracers *t, int32_t tracer)
{
	push(t, &t->orders, (struct lp_attach){.tracer = tracer});
	lp_wakeup(t->wake);
}

int lp_tracers_event_fd(const struct lp_tracers *t)
{
	return t->event;
}

size_t lp_tracers_take(struct lp_tracers *t, struct lp_attach *attaches, size_t max)
{
	size_t nr;

	lp_wakeup_clear(t->event);
	nr = pop(t, &t->reported, attaches, max);
	if (nr == max)
		lp_wakeup(t->event); /* there may be more */
	return nr;
}

void lp_tracers_stop(struct lp_tracers *t)
{
	atomic_store(&t->stopped, true);
	lp_wakeup(t->wake);
}
