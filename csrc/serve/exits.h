/* How a process ended that is not our child. */
#ifndef LAZYPAGES_EXITS_H
#define LAZYPAGES_EXITS_H

#include <stdbool.h>

/*
 * The wait status (wait(2)) of the process behind a pidfd, once its parent has waited for it: PIDFD_GET_INFO with
 * PIDFD_INFO_EXIT, since Linux 6.15 (kernel/pid.c and fs/pidfs.c, pidfs_exit).  -1: it is not known.
 */
int lp_exit_status(int pidfd);
/* Whether this kernel has that.  Tries it on a process of its own, which ends at once. */
bool lp_exit_status_works(void);

#endif
