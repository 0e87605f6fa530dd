/*
 * What becomes of the tasks when the daemon itself is killed.
 *
 * The kernel gives zeros for all that is missing when the last file
 * descriptor of a userfaultfd is closed (userfaultfd(2)), and SIGKILL closes
 * those of a daemon without asking it.  So a second process shares its table
 * of file descriptors (CLONE_FILES, clone(2)): whatever the daemon holds it
 * holds as well, without being told, and when the daemon is gone it kills the
 * tasks that still miss pages, and closes nothing before they are gone.
 */
#ifndef LAZYPAGES_GUARD_H
#define LAZYPAGES_GUARD_H

#include <sys/types.h>

struct lp_guard;

/* Starts the second process, which says on log_fd what it had to do.  NULL with errno set. */
struct lp_guard *lp_guard_start(int log_fd);
/*
 * The process that began it ends regularly.  If it leaves uffds open whose tasks are not gone after a moment, these miss pages
 * and nothing else could be done for them: then the second process stays, and does its work as soon as the first has ended.
 */
void lp_guard_end(struct lp_guard *guard);
pid_t lp_guard_pid(const struct lp_guard *guard);

/*
 * What the daemon knows of a uffd; guard may be NULL.  One that it knows nothing of is held until the memory behind it is
 * gone.  names: whose it is, 0 and -1 if that is not known.  The process is killed by its pidfd, which is duplicated: its
 * memory may outlive it (CLONE_VM), and then its pid may be another's.
 */
void lp_guard_names(struct lp_guard *guard, int uffd, pid_t pid, int pidfd);
void lp_guard_complete(struct lp_guard *guard, int uffd); /* nothing is missing behind it */

#endif
