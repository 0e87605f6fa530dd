/*
 * What the two sides of the guard share: the daemon's (guard.c), and what the second process does once the daemon is gone
 * (guard_takeover.c).
 */
#ifndef LAZYPAGES_GUARD_INNER_H
#define LAZYPAGES_GUARD_INNER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "guard.h"

#define LP_GUARD_COMPLETE (-1)
#define LP_GUARD_LOOK_MS 20 /* between two looks at what is left; more and more, up to LOOK_MOST_MS, while that stays as it is */
#define LP_GUARD_LOOK_MOST_MS 640L

/* In memory that daemon and guard share.  It outlives a guard that is killed, and the next one goes on with it. */
struct lp_guard {
	pid_t pid;
	int pidfd;  /* of the guard; the daemon's, and -1 if there is no guard at the moment */
	int daemon; /* pidfd */
	int log_fd;
	int shared; /* a listening socket that is not only the daemon's; -1 */
	bool json; /* the log's lines are objects */
	void *unreadable; /* a page that can't be read */
	char *command; /* the bytes that /proc/PID/cmdline shows: command_size of them */
	size_t command_size;
	int top; /* the guard's, when it takes over: all descriptors in use are below this */
	_Atomic uint32_t ready; /* the guard has its own name; a futex */
	_Atomic bool left; /* the daemon has ended regularly, but for what it had to leave */
	_Atomic int32_t left_behind; /* uffds that are marked below */
	_Atomic int32_t left_bound; /* all of them are below this */
	struct {
		_Atomic int32_t pid; /* 0: nothing is known; LP_GUARD_COMPLETE */
		_Atomic int32_t pidfd; /* the daemon's; only if there is a pid */
		_Atomic bool left_behind; /* nobody serves it, and it stays open: lp_guard_close_gone() */
	} about[LP_GUARD_FDS]; /* by uffd */
};

bool lp_is_uffd(int fd);
/* Whether the memory behind a uffd does not exist any more. */
bool lp_guard_is_gone(const struct lp_guard *g, int uffd);
/* The daemon is gone.  Everything here works on the file descriptors that it has left. */
void lp_guard_take_over(struct lp_guard *g);

#endif
