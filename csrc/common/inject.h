/*
 * ptrace requests on a stopped task, and execution of system calls in it.
 *
 * Shared by dumptool (a cffi module) and the restorer (a static program).
 * Every function returns 0 or -errno, keeps no state, allocates no memory, and
 * must be called by the thread that traces the task.  -ESRCH: the task has
 * exited, or is not traced by the caller, or is not stopped.
 */
#ifndef LAZYPAGES_INJECT_H
#define LAZYPAGES_INJECT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

/*
 * Attaches without stopping the task (PTRACE_SEIZE, PTRACE_O_TRACESYSGOOD).  When the tracer
 * dies, the kernel detaches the task, which then continues.
 */
int lp_seize(pid_t tid);

/* Sets further PTRACE_O_* options of a seized, stopped task; TRACESYSGOOD is always kept. */
int lp_set_options(pid_t tid, uint64_t options);

/* Requests a stop of a seized task without waiting for it, so that many threads stop in parallel. */
int lp_interrupt(pid_t tid);

/*
 * Waits until a seized, interrupted task has stopped.  Signals whose delivery has begun are
 * delivered first.  *group_stop (may be NULL): the signal (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU) of the job-control
 * stop that the task was in, or 0.
 */
int lp_wait_stop(pid_t tid, int *group_stop);

/* The same without waiting: -EAGAIN if the task has not stopped yet. */
int lp_poll_stop(pid_t tid, int *group_stop);

/*
 * Removes the pending SIGSTOP of a process without stopping it and without notifying its parent.  The given stopped
 * thread takes its signals up to the SIGSTOP, which is dropped; earlier ones are delivered.  Afterwards the thread is
 * stopped again.  It has not been in user mode, unless a SIGCONT from elsewhere has removed the SIGSTOP.
 */
int lp_drop_sigstop(pid_t tid);

/* lp_interrupt() and lp_wait_stop(). */
int lp_interrupt_wait(pid_t tid);

/* Detaches: the task continues.  A task in a job-control stop stays in it. */
int lp_detach(pid_t tid);

int lp_get_regs(pid_t tid, struct user_regs_struct *regs);
int lp_set_regs(pid_t tid, const struct user_regs_struct *regs);

/*
 * NT_X86_XSTATE: the XSAVE area in the standard (not compacted) layout; XCR0 is at byte 464.
 * lp_get_xstate: *size is the capacity of buf, and on return the number of bytes stored.
 */
int lp_get_xstate(pid_t tid, void *buf, size_t *size);
int lp_set_xstate(pid_t tid, const void *buf, size_t size);

/* The mask of blocked signals: bit n-1 for signal n. */
int lp_get_sigmask(pid_t tid, uint64_t *mask);
int lp_set_sigmask(pid_t tid, uint64_t mask);

/* Copies memory of the task.  -EFAULT unless all of [address, address + size) is accessible. */
int lp_read_memory(pid_t pid, uint64_t address, void *local, size_t size);
int lp_write_memory(pid_t pid, uint64_t address, const void *local, size_t size);

/* Finds the first occurrence of `size` bytes (1 to 16) in [start, end) of the task's memory; -ENOENT if there is none. */
int lp_find_bytes(pid_t pid, uint64_t start, uint64_t end, const void *bytes, size_t size, uint64_t *address);

/* Finds the first `syscall` instruction in [start, end), for instance of the vdso; -ENOENT if there is none. */
int lp_find_syscall_insn(pid_t pid, uint64_t start, uint64_t end, uint64_t *ip);

/*
 * Runs one system call with the registers `base`, in which rip, rax, orig_rax and the six argument
 * registers are replaced.  Does not block signals: the caller must do so before.  On return the task is in
 * the stop at the end of the system call, with its registers at that point.
 *
 * *ret is the result of the system call, separate from the errors of this function.  -EIO: the task has
 * faulted: there is no code at syscall_ip.
 */
int lp_call(pid_t tid, const struct user_regs_struct *base, uint64_t syscall_ip, long nr, const uint64_t args[6],
	    long *ret);

#endif
