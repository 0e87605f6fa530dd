/*
 * Finds threads that begin to trace a process (ptrace), and holds them.
 *
 * The kernel reports each PTRACE_ATTACH and PTRACE_SEIZE through the process connector (drivers/connector/cn_proc.c,
 * PROC_EVENT_PTRACE; Linux 3.1 and later), to listeners in the first user, PID and network namespace that have
 * CAP_NET_ADMIN.  Elsewhere inotify reports when a file in /proc/PID is opened, as tools do that are about to look at a process,
 * and /proc/PID/status says whether it is traced then.  That needs no privilege, but works only for tools that use the same mount of
 * /proc; so the owner looks as well, now and then, and reports what it finds.
 *
 * A tracer is held by tracing its thread ourselves and interrupting it: that is undone by the kernel when this process
 * ends, however it ends, and neither the tracer nor its parent sees it.
 *
 * Several daemons on one machine may want the same tracer, which only one of them can trace.  The others know that one by the name of
 * its thread, and take the tracer as soon as it is let go.
 *
 * One thread drives it (lp_tracers_run): what ptrace has attached only the attaching thread may let go.
 */
#ifndef LAZYPAGES_TRACERS_H
#define LAZYPAGES_TRACERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lp_tracers;

struct lp_attach {
	int32_t pid;	/* the process that is traced; 0: there were more than could be reported, look at all processes */
	int32_t tracer; /* the thread that traces it */
	int32_t owner;	/* that thread's process */
	int32_t error;	/* 0: the tracer stands still until lp_tracers_release; else the errno of why it can't be had so */
};

/* NULL with errno */
struct lp_tracers *lp_tracers_new(void);
void lp_tracers_free(struct lp_tracers *tracers);
/* Whether the kernel reports every attach.  If not, look. */
bool lp_tracers_reported(const struct lp_tracers *tracers);
/* Processes whose tracers are held at once (0: all there are).  The tracers of others are reported with EAGAIN. */
void lp_tracers_watch(struct lp_tracers *tracers, int32_t pid, bool watched);
/* Holds a tracer that was found in another way, or reported with EAGAIN.  It is reported (again). */
void lp_tracers_report(struct lp_tracers *tracers, int32_t pid, int32_t tracer, int32_t owner);
/* Lets a tracer go on; as often as it was held. */
void lp_tracers_release(struct lp_tracers *tracers, int32_t tracer);
/* Readable when there are attaches to take. */
int lp_tracers_event_fd(const struct lp_tracers *tracers);
size_t lp_tracers_take(struct lp_tracers *tracers, struct lp_attach *attaches, size_t max);
/* Until lp_tracers_stop.  Lets all go at the end.  0 or -errno. */
int lp_tracers_run(struct lp_tracers *tracers);
void lp_tracers_stop(struct lp_tracers *tracers);

#endif
