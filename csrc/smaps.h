/* What only /proc/PID/smaps tells of a task's mappings. */
#ifndef LAZYPAGES_SMAPS_H
#define LAZYPAGES_SMAPS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Keeps a descriptor back for lp_each_mapping: what a fork finds zeroed must be known also when the fork has got the last one.
 * 0 or -errno.
 */
int lp_mappings_reserve(void);

/*
 * Calls found for each mapping of process pid, from the lowest on; wiped: a forked child finds it zeroed (MADV_WIPEONFORK;
 * "wf" in VmFlags, proc_pid_smaps(5)).  0 or -errno; -ESRCH when the process is not the one of pidfd any more, or has no
 * memory.  pidfd may be -1: not known.
 */
int lp_each_mapping(pid_t pid, int pidfd, void (*found)(void *arg, uint64_t start, uint64_t end, bool wiped), void *arg);

#endif
