/* State of a stopped task that only system calls missing in Python show. All functions return 0 or -errno. */
#ifndef LAZYPAGES_DUMP_TASK_H
#define LAZYPAGES_DUMP_TASK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* kcmp(2): sets *same to whether both processes share the resource `type` (LP_SAME_*). */
#define LP_SAME_FILE 0	/* compares the open file descriptions of descriptors idx1 and idx2 */
#define LP_SAME_VM 1
#define LP_SAME_FILES 2
#define LP_SAME_FS 3
#define LP_SAME_SIGHAND 4
int lp_same(pid_t pid1, pid_t pid2, int type, uint64_t idx1, uint64_t idx2, int *same);

/* Duplicates a descriptor of the task into our process, close-on-exec (pidfd_getfd(2), Linux 5.6). */
int lp_take_fd(pid_t pid, int fd, int *here);
int lp_take_fd_by(int pidfd, int fd, int *here);

/*
 * Signals pending for the thread (shared 0) or its process (1): *count siginfo_t of 128 bytes, oldest first; -ENOBUFS if
 * there are more than room.
 */
int lp_pending_signals(pid_t tid, int shared, unsigned char *siginfos, size_t room, size_t *count);

/*
 * Copies the contents of a pipe without consuming them; `fd` is either end. Stores *count bytes. -ENOBUFS if it holds
 * more than size, or more than a pipe that we may create.
 */
int lp_peek_pipe(int fd, unsigned char *buffer, size_t size, size_t *count);

int lp_robust_list(pid_t tid, uint64_t *head, uint64_t *size);

/* The registration of restartable sequences of a stopped thread. */
struct lp_rseq {
	uint64_t address; /* 0: none */
	uint32_t size, signature;
};
int lp_rseq(pid_t tid, struct lp_rseq *rseq);

/* Whether a stopped thread has Syscall User Dispatch on: a system call injected into it would raise SIGSYS instead. */
int lp_dispatches_syscalls(pid_t tid, int *on);

/*
 * Whether the mapping at a page is registered with a userfaultfd: 1 or 0; 0 also if unknown. Has no side effect. A
 * registration ends with munmap, and with mremap unless the userfaultfd has UFFD_FEATURE_EVENT_REMAP
 * (mremap_userfaultfd_prep() in fs/userfaultfd.c).
 */
int lp_is_registered(int uffd, uint64_t address);

#endif
