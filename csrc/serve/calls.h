/* Finds the system calls in which the threads of a task wait: /proc/PID/task/TID/syscall, proc_pid_syscall(5). */
#ifndef LAZYPAGES_CALLS_H
#define LAZYPAGES_CALLS_H

#include <stdint.h>
#include <sys/types.h>

/*
 * Whether a thread of process pid waits until the event of its munmap, mmap or mremap is read, and that call has unmapped all of
 * [start, end).  Returns 1, 0, or -errno if that can't be determined; -ESRCH: the process is no longer that of pidfd.  pidfd may be
 * -1: not known.
 */
int lp_reports_departure(pid_t pid, int pidfd, uint64_t start, uint64_t end);

#endif
