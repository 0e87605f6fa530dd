#define _GNU_SOURCE
#include "dump_task.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/fs.h>

#include "common/linux_compat.h"
#include "common/probe.h"

#define SIGINFO_SIZE 128

_Static_assert(LP_SAME_FILE == KCMP_FILE && LP_SAME_VM == KCMP_VM && LP_SAME_FILES == KCMP_FILES &&
		       LP_SAME_FS == KCMP_FS && LP_SAME_SIGHAND == KCMP_SIGHAND,
	       "numbers of kcmp(2)");

int lp_same(pid_t pid1, pid_t pid2, int type, uint64_t idx1, uint64_t idx2, int *same)
{
	long order = syscall(SYS_kcmp, pid1, pid2, type, idx1, idx2);

	if (order < 0)
		return -errno;
	*same = order == 0;
	return 0;
}

int lp_take_fd_by(int pidfd, int fd, int *here)
{
	*here = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	return *here < 0 ? -errno : 0;
}

int lp_take_fd(pid_t pid, int fd, int *here)
{
	int pidfd = syscall(SYS_pidfd_open, pid, 0);
	int rc;

	if (pidfd < 0)
		return -errno;
	rc = lp_take_fd_by(pidfd, fd, here);
	close(pidfd);
	return rc;
}

int lp_pending_signals(pid_t tid, int shared, unsigned char *siginfos, size_t room, size_t *count)
{
	*count = 0;
	for (;;) {
		unsigned char one[SIGINFO_SIZE];
		struct __ptrace_peeksiginfo_args args = {
			.off = *count,
			.flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0,
			.nr = 1,
		};
		long got = ptrace(PTRACE_PEEKSIGINFO, tid, &args, one);

		if (got < 0)
			return -errno;
		if (got == 0)
			return 0;
		if (*count == room)
			return -ENOBUFS;
		memcpy(siginfos + *count * SIGINFO_SIZE, one, SIGINFO_SIZE);
		(*count)++;
	}
}

int lp_peek_pipe(int fd, unsigned char *buffer, size_t size, size_t *count)
{
	char name[32];
	int held, copy[2] = { -1, -1 };
	int rc = 0;
	int end; /* our own read end: fd may be the write end */

	*count = 0;
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	end = open(name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (end < 0)
		return -errno;
	if (ioctl(end, FIONREAD, &held) < 0 || pipe2(copy, O_CLOEXEC | O_NONBLOCK) < 0) {
		rc = -errno;
	} else if (held) {
		ssize_t got;

		fcntl(copy[1], F_SETPIPE_SZ, fcntl(end, F_GETPIPE_SZ)); /* if refused, tee copies less: below */
		got = tee(end, copy[1], held, SPLICE_F_NONBLOCK);
		if (got < 0)
			rc = -errno;
		else if (got < held || (size_t)held > size)
			rc = -ENOBUFS;
		while (!rc && *count < (size_t)held) {
			got = read(copy[0], buffer + *count, held - *count);
			if (got > 0)
				*count += got;
			else if (errno != EINTR)
				rc = got < 0 ? -errno : -EIO;
		}
	}
	close(end);
	if (copy[0] >= 0) {
		close(copy[0]);
		close(copy[1]);
	}
	return rc;
}

int lp_robust_list(pid_t tid, uint64_t *head, uint64_t *size)
{
	return syscall(SYS_get_robust_list, tid, head, size) < 0 ? -errno : 0;
}

int lp_rseq(pid_t tid, struct lp_rseq *rseq)
{
	struct {
		uint64_t address;
		uint32_t size, signature, flags, pad;
	} got;

	memset(rseq, 0, sizeof(*rseq));
	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, (void *)sizeof(got), &got) < 0)
		return errno == EIO || errno == EINVAL ? 0 : -errno; /* before Linux 5.13, or without CONFIG_RSEQ */
	rseq->address = got.address;
	rseq->size = got.size;
	rseq->signature = got.signature;
	return 0;
}

int lp_dispatches_syscalls(pid_t tid, int *on)
{
	struct {
		uint64_t mode, selector, offset, size; /* struct ptrace_sud_config of linux/ptrace.h */
	} got;

	*on = 0;
	if (ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, (void *)sizeof(got), &got) < 0)
		return errno == EIO ? 0 : -errno; /* before Linux 6.4: unknown; if it is on, an injected call fails, -EIO */
	*on = got.mode != 0; /* PR_SYS_DISPATCH_OFF */
	return 0;
}

int lp_is_registered(int uffd, uint64_t address)
{
	static void *nowhere;
	int rc;

	if (!nowhere) {
		void *made = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (made == MAP_FAILED)
			return 0;
		nowhere = made;
	}
	/* EINVAL: the mapping is of a file; EEXIST: a huge page is there (mfill_atomic() in mm/userfaultfd.c). */
	rc = lp_probe(uffd, nowhere, address);
	return rc == EFAULT || rc == EINVAL || rc == EEXIST;
}
