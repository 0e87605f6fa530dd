/* What the threads of a task wait in: /proc/PID/task/TID/syscall, proc_pid_syscall(5). */
#ifndef LAZYPAGES_CALLS_H
#define LAZYPAGES_CALLS_H

#include <stdint.h>
#include <sys/types.h>

/*
 * Whether a thread of process pid waits for the event to be read that tells of a call which has left all of [start, end): munmap,
 * mmap in its place, or mremap.  1, 0, or -errno: it can't be seen; -ESRCH when the process is not the one of pidfd any more.
 * pidfd may be -1: not known.
 */
int lp_reports_departure(pid_t pid, int pidfd, uint64_t start, uint64_t end);

#endif
