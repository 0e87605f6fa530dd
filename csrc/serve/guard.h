/*
 * What becomes of the tasks when the daemon itself is killed.
 *
 * The kernel gives zeros for all that is missing when the last file
 * descriptor of a userfaultfd is closed (userfaultfd(2)), and SIGKILL closes
 * those of a daemon without asking it.  So a second process shares its table
 * of file descriptors (CLONE_FILES, clone(2)): it has every descriptor that the
 * daemon has, without being informed.  When the daemon is gone it kills the
 * tasks that still miss pages, and closes nothing before they are gone.
 */
#ifndef LAZYPAGES_GUARD_H
#define LAZYPAGES_GUARD_H

#include <stdbool.h>
#include <sys/types.h>

struct lp_guard;

/* It looks after descriptors below this number; the daemon's RLIMIT_NOFILE must not be higher. */
#define LP_GUARD_FDS (1 << 20)

/*
 * Starts the second process, which says on log_fd what it had to do: lines of text, or JSON objects.  NULL with errno set.
 * shared: a listening socket that other processes have, too, and that no restorer connects to, or -1: the second process accepts
 * nothing there, and does not shut it down, which would refuse clients for all of them (net/unix/af_unix.c, unix_stream_connect).  It must stay open until the
 * daemon's end, so that its number names nothing else.
 */
struct lp_guard *lp_guard_start(int log_fd, bool json, int shared);
/*
 * If the second process has ended, as its pidfd shows, starts another that knows all that it knew.  0 or -errno: then there is
 * none, and the pidfd is -1.  Other threads may run meanwhile; one at a time calls this.
 */
int lp_guard_restart(struct lp_guard *guard);
/*
 * The process that began it ends regularly.  If it leaves uffds open whose tasks are not gone after a moment, these miss pages
 * and nothing else could be done for them: then the second process stays, and does its work as soon as the first has ended.
 */
void lp_guard_end(struct lp_guard *guard);
pid_t lp_guard_pid(const struct lp_guard *guard);
/* Readable when the second process has ended.  The guard's own. */
int lp_guard_pidfd(const struct lp_guard *guard);

/*
 * What the daemon knows of a uffd; guard may be NULL.  One that it knows nothing of is held until the memory behind it is
 * gone.  names: whose it is, 0 and -1 if that is not known.  The process is killed by its pidfd, for its memory may outlive it
 * (CLONE_VM), and then its pid may be another's; the pidfd stays the caller's, and open as long as the uffd is.
 */
void lp_guard_names(struct lp_guard *guard, int uffd, pid_t pid, int pidfd);
void lp_guard_complete(struct lp_guard *guard, int uffd); /* nothing is missing behind it */
/* Closes a uffd; nothing is known of its number from then on. */
void lp_guard_close(struct lp_guard *guard, int uffd);
/*
 * For a process that outlives its restores.  lp_guard_leave: nobody serves this uffd any more, and it must stay open until the
 * memory behind it is gone.  lp_guard_close_gone closes those of which that is true by now, and returns how many are left; one
 * thread at a time calls it.  lp_guard_needs: whether this pidfd names the process of one that is left.
 */
void lp_guard_leave(struct lp_guard *guard, int uffd);
int lp_guard_close_gone(struct lp_guard *guard);
bool lp_guard_needs(const struct lp_guard *guard, int pidfd);

#endif
