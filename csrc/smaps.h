/* What only /proc/PID/smaps tells of a task's mappings. */
#ifndef LAZYPAGES_SMAPS_H
#define LAZYPAGES_SMAPS_H

#include <stdint.h>
#include <sys/types.h>

/*
 * Calls found for each mapping of process pid that a forked child finds zeroed (MADV_WIPEONFORK; "wf" in VmFlags,
 * proc_pid_smaps(5)).  0 or -errno.
 */
int lp_each_wiped(pid_t pid, void (*found)(void *arg, uint64_t start, uint64_t end), void *arg);

#endif
