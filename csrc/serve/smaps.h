/* What only /proc/PID/smaps shows of a task's mappings. */
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

/*
 * Whether the mappings of the pages before and at `edge` differ in nothing that smaps shows, or one of those in [start, end) is
 * sealed ("sl"); false when it is not known.
 */
bool lp_mappings_alike(pid_t pid, int pidfd, uint64_t edge, uint64_t start, uint64_t end);
/* Whether the mapping of the page at addr may grow downwards ("gd"); true when it is not known. */
bool lp_mapping_grows(pid_t pid, int pidfd, uint64_t addr);
/* Whether there is a mapping of the page at addr; true when it is not known. */
bool lp_is_mapped(pid_t pid, int pidfd, uint64_t addr);

#endif
