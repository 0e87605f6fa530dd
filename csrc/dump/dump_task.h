/* What a stopped task shows only through system calls that Python does not have. 0 or -errno, as in inject.h. */
#ifndef LAZYPAGES_DUMP_TASK_H
#define LAZYPAGES_DUMP_TASK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* kcmp(2): *same is 1 when both processes share the thing; type is LP_SAME_*. */
#define LP_SAME_FILE 0	/* idx1 and idx2: descriptors of one open file description */
#define LP_SAME_VM 1
#define LP_SAME_FILES 2
#define LP_SAME_FS 3
#define LP_SAME_SIGHAND 4
int lp_same(pid_t pid1, pid_t pid2, int type, uint64_t idx1, uint64_t idx2, int *same);

/* Our own descriptor (close-on-exec) of the task's open file description. */
int lp_take_fd(pid_t pid, int fd, int *here);

/*
 * Signals that are pending for the thread (shared 0) or its whole process (1): *count siginfo_t of 128 bytes, oldest
 * first; -ENOBUFS when there are more than room.
 */
int lp_pending_signals(pid_t tid, int shared, unsigned char *siginfos, size_t room, size_t *count);

/*
 * What is in a pipe, of which `fd` is either end, without taking it out: *count bytes; -ENOBUFS when it holds more than
 * size or than a pipe that we may make.
 */
int lp_peek_pipe(int fd, unsigned char *buffer, size_t size, size_t *count);

int lp_robust_list(pid_t tid, uint64_t *head, uint64_t *size);

struct lp_rseq {
	uint64_t address; /* 0: none */
	uint32_t size, signature;
};
int lp_rseq(pid_t tid, struct lp_rseq *rseq);

/* Whether a stopped thread has Syscall User Dispatch on: then a call that we have it make is a SIGSYS for it instead. */
int lp_dispatches_syscalls(pid_t tid, int *on);

/*
 * Whether the mapping at a page is registered with a userfaultfd: 1 or 0, also 0 in doubt. Nothing is done to it. A
 * registration ends with munmap and mremap (without UFFD_FEATURE_EVENT_REMAP: mremap_userfaultfd_prep in the kernel's
 * fs/userfaultfd.c).
 */
int lp_is_registered(int uffd, uint64_t address);

#endif
