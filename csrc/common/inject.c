#define _GNU_SOURCE
#include "inject.h"

#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* WSTOPSIG of a system-call stop with PTRACE_O_TRACESYSGOOD, ptrace(2). */
#define SYSCALL_STOP (SIGTRAP | 0x80)

static int request(int what, pid_t tid, uint64_t address, uint64_t data)
{
	return ptrace(what, tid, (void *)address, (void *)data) < 0 ? -errno : 0;
}

/* Waits for the next stop of the task. -ESRCH if it exits. With WNOHANG: -EAGAIN if it has not stopped yet. */
static int next_stop(pid_t tid, int options, int *signo, int *event)
{
	int status;

	for (;;) {
		pid_t got = waitpid(tid, &status, __WALL | options);

		if (got == tid)
			break;
		if (got == 0)
			return -EAGAIN;
		if (errno != EINTR)
			return errno == ECHILD ? -ESRCH : -errno;
	}
	if (!WIFSTOPPED(status))
		return -ESRCH;
	*signo = WSTOPSIG(status);
	*event = status >> 16;
	return 0;
}

int lp_seize(pid_t tid)
{
	return request(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD);
}

int lp_set_options(pid_t tid, uint64_t options)
{
	return request(PTRACE_SETOPTIONS, tid, 0, options | PTRACE_O_TRACESYSGOOD);
}

int lp_interrupt(pid_t tid)
{
	return request(PTRACE_INTERRUPT, tid, 0, 0);
}

static int wait_stop(pid_t tid, int options, int *group_stop)
{
	for (;;) {
		int signo, event, deliver = 0;
		int rc = next_stop(tid, options, &signo, &event);

		if (rc)
			return rc;
		if (event == PTRACE_EVENT_STOP) {
			if (group_stop)
				*group_stop = signo == SIGTRAP ? 0 : signo;
			return 0;
		}
		if (event == 0 && signo != SYSCALL_STOP)
			deliver = signo;
		lp_interrupt(tid); /* again: any stop consumes a pending interrupt (ptrace_stop() in kernel/signal.c) */
		rc = request(PTRACE_CONT, tid, 0, deliver);
		if (rc)
			return rc;
	}
}

int lp_wait_stop(pid_t tid, int *group_stop)
{
	return wait_stop(tid, 0, group_stop);
}

int lp_poll_stop(pid_t tid, int *group_stop)
{
	return wait_stop(tid, WNOHANG, group_stop);
}

int lp_drop_sigstop(pid_t tid)
{
	int waited = 0, interrupted = 0;
	int rc = request(PTRACE_CONT, tid, 0, 0);

	while (!rc) {
		int signo, event, deliver = 0;

		rc = next_stop(tid, WNOHANG, &signo, &event);
		if (rc == -EAGAIN) {
			usleep(100);
			rc = ++waited == 1000 && !interrupted ? lp_interrupt(tid) : 0;
			interrupted |= waited >= 1000;
			continue;
		}
		if (rc || event == PTRACE_EVENT_STOP)
			break;
		if (event == 0 && signo == SIGSTOP)
			interrupted = 1;
		else if (event == 0 && signo != SYSCALL_STOP)
			deliver = signo;
		if (interrupted)
			rc = lp_interrupt(tid); /* again: any stop consumes a pending interrupt */
		if (!rc)
			rc = request(PTRACE_CONT, tid, 0, deliver);
	}
	return rc;
}

int lp_interrupt_wait(pid_t tid)
{
	int rc = lp_interrupt(tid);

	return rc ? rc : lp_wait_stop(tid, NULL);
}

int lp_detach(pid_t tid)
{
	return request(PTRACE_DETACH, tid, 0, 0);
}

int lp_get_regs(pid_t tid, struct user_regs_struct *regs)
{
	struct iovec iov = { .iov_base = regs, .iov_len = sizeof(*regs) };

	return request(PTRACE_GETREGSET, tid, NT_PRSTATUS, (uintptr_t)&iov);
}

int lp_set_regs(pid_t tid, const struct user_regs_struct *regs)
{
	struct iovec iov = { .iov_base = (void *)regs, .iov_len = sizeof(*regs) };

	return request(PTRACE_SETREGSET, tid, NT_PRSTATUS, (uintptr_t)&iov);
}

int lp_get_xstate(pid_t tid, void *buf, size_t *size)
{
	struct iovec iov = { .iov_base = buf, .iov_len = *size };
	int rc = request(PTRACE_GETREGSET, tid, NT_X86_XSTATE, (uintptr_t)&iov);

	*size = rc ? 0 : iov.iov_len;
	return rc;
}

int lp_set_xstate(pid_t tid, const void *buf, size_t size)
{
	struct iovec iov = { .iov_base = (void *)buf, .iov_len = size };

	return request(PTRACE_SETREGSET, tid, NT_X86_XSTATE, (uintptr_t)&iov);
}

int lp_get_sigmask(pid_t tid, uint64_t *mask)
{
	return request(PTRACE_GETSIGMASK, tid, sizeof(*mask), (uintptr_t)mask);
}

int lp_set_sigmask(pid_t tid, uint64_t mask)
{
	return request(PTRACE_SETSIGMASK, tid, sizeof(mask), (uintptr_t)&mask);
}

int lp_read_memory(pid_t pid, uint64_t address, void *local, size_t size)
{
	struct iovec here = { .iov_base = local, .iov_len = size };
	struct iovec there = { .iov_base = (void *)address, .iov_len = size };
	ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0);

	if (got < 0)
		return -errno;
	return (size_t)got == size ? 0 : -EFAULT;
}

int lp_write_memory(pid_t pid, uint64_t address, const void *local, size_t size)
{
	struct iovec here = { .iov_base = (void *)local, .iov_len = size };
	struct iovec there = { .iov_base = (void *)address, .iov_len = size };
	ssize_t put = process_vm_writev(pid, &here, 1, &there, 1, 0);

	if (put < 0)
		return -errno;
	return (size_t)put == size ? 0 : -EFAULT;
}

int lp_find_bytes(pid_t pid, uint64_t start, uint64_t end, const void *bytes, size_t size, uint64_t *address)
{
	char window[16 + 4096];
	size_t kept = 0; /* end of the previous window: the bytes may span two */

	if (size == 0 || size > 16)
		return -EINVAL;
	while (start < end) {
		size_t part = 4096 - start % 4096;
		char *found;
		int rc;

		if (part > end - start)
			part = end - start;
		rc = lp_read_memory(pid, start, window + kept, part);
		if (rc)
			return rc;
		found = memmem(window, kept + part, bytes, size);
		if (found) {
			*address = start - kept + (found - window);
			return 0;
		}
		start += part;
		part += kept;
		kept = part < size - 1 ? part : size - 1;
		memmove(window, window + part - kept, kept);
	}
	return -ENOENT;
}

int lp_find_syscall_insn(pid_t pid, uint64_t start, uint64_t end, uint64_t *ip)
{
	return lp_find_bytes(pid, start, end, "\x0f\x05", 2, ip);
}

/*
 * Lets the task run to its next system-call stop.  A SIGSTOP on the way, which can't be blocked, is suppressed and
 * reported in *held; the caller sends it again.  Any other signal must be a fault of the task itself (-EIO): there is
 * no code at that address.
 */
static int run_to_syscall_stop(pid_t tid, bool *held)
{
	for (;;) {
		int signo, event;
		int rc = request(PTRACE_SYSCALL, tid, 0, 0);

		if (!rc)
			rc = next_stop(tid, 0, &signo, &event);
		if (rc)
			return rc;
		if (event)
			continue;
		if (signo == SYSCALL_STOP)
			return 0;
		if (signo != SIGSTOP)
			return -EIO;
		*held = true;
	}
}

int lp_call(pid_t tid, const struct user_regs_struct *base, uint64_t syscall_ip, long nr, const uint64_t args[6],
	    long *ret)
{
	struct user_regs_struct regs = *base;
	bool held = false;
	int rc;

	regs.rip = syscall_ip;
	regs.rax = nr;
	regs.orig_rax = -1; /* not in a system call: else the kernel would change rip to restart it */
	regs.rdi = args[0];
	regs.rsi = args[1];
	regs.rdx = args[2];
	regs.r10 = args[3];
	regs.r8 = args[4];
	regs.r9 = args[5];
	rc = lp_set_regs(tid, &regs);
	if (!rc)
		rc = run_to_syscall_stop(tid, &held); /* entry */
	if (!rc)
		rc = run_to_syscall_stop(tid, &held); /* exit */
	if (held)
		syscall(SYS_tkill, tid, SIGSTOP);
	if (!rc)
		rc = lp_get_regs(tid, &regs);
	if (!rc)
		*ret = regs.rax;
	return rc;
}
