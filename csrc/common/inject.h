/*
 * Running system calls in a stopped task, and the ptrace calls around it.
 *
 * Shared by the dump tool (a cffi module) and the restorer (a static program).
 * Every function returns 0 or -errno, keeps no state, allocates nothing and
 * must be called from the thread that traces the task.  -ESRCH: the task is gone
 * (or is not ours, or is not stopped).
 */
#ifndef LAZYPAGES_INJECT_H
#define LAZYPAGES_INJECT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

/*
 * Attach without stopping the task (PTRACE_SEIZE, PTRACE_O_TRACESYSGOOD).  When the tracer
 * dies, the kernel detaches the task and lets it run on.
 */
int lp_seize(pid_t tid);

/* More PTRACE_O_* options for a seized, stopped task; TRACESYSGOOD is always kept. */
int lp_set_options(pid_t tid, uint64_t options);

/* Ask a seized task to stop, without waiting: many threads are stopped faster that way. */
int lp_interrupt(pid_t tid);

/*
 * Wait until a seized, interrupted task has stopped.  Signals that it was about to take are
 * given to it first.  *group_stop (may be NULL): 0, or SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU when the
 * task was in a job-control stop anyway.
 */
int lp_wait_stop(pid_t tid, int *group_stop);

/* The same without waiting: -EAGAIN while the task has not stopped yet. */
int lp_poll_stop(pid_t tid, int *group_stop);

/*
 * Let a stopped thread, for whose process SIGSTOP is pending, take its signals up to that one, which is dropped: it
 * stops nothing, and nobody is told.  Signals before it are given to the thread.  Afterwards it is stopped again; it has
 * not been in user mode, unless somebody's SIGCONT has taken the SIGSTOP away.
 */
int lp_drop_sigstop(pid_t tid);

/* lp_interrupt and lp_wait_stop. */
int lp_interrupt_wait(pid_t tid);

/* Let the task go on, untraced.  A task in job-control stop stays in it. */
int lp_detach(pid_t tid);

int lp_get_regs(pid_t tid, struct user_regs_struct *regs);
int lp_set_regs(pid_t tid, const struct user_regs_struct *regs);

/*
 * NT_X86_XSTATE: the XSAVE area in the standard (not compacted) layout; XCR0 is at byte 464.
 * lp_get_xstate: *size is the room in buf, and then what was written there.
 */
int lp_get_xstate(pid_t tid, void *buf, size_t *size);
int lp_set_xstate(pid_t tid, const void *buf, size_t size);

/* The mask of blocked signals, bit n-1 for signal n. */
int lp_get_sigmask(pid_t tid, uint64_t *mask);
int lp_set_sigmask(pid_t tid, uint64_t mask);

/* All of [local, local + size) or an error: -EFAULT when some of it is not there. */
int lp_read_memory(pid_t pid, uint64_t address, void *local, size_t size);
int lp_write_memory(pid_t pid, uint64_t address, const void *local, size_t size);

/* First place of `size` bytes (1 to 16) in [start, end) of the task's memory; -ENOENT when there is none. */
int lp_find_bytes(pid_t pid, uint64_t start, uint64_t end, const void *bytes, size_t size, uint64_t *address);

/* First `syscall` instruction in [start, end), for instance the vdso's; -ENOENT when there is none. */
int lp_find_syscall_insn(pid_t pid, uint64_t start, uint64_t end, uint64_t *ip);

/*
 * Run one system call from the register set `base` (its rip, rax, orig_rax and the six argument
 * registers are replaced; its stack pointer and all else are what the task has from then on).  Signals are
 * left as they are: block them before.  The task is left in the stop at the end of the system
 * call, with the registers that it has there.
 *
 * *ret is the system call's own result, so -errno of the task's call and that of ours are
 * never confused.  -EIO: there is no code at syscall_ip.
 */
int lp_call(pid_t tid, const struct user_regs_struct *base, uint64_t syscall_ip, long nr, const uint64_t args[6],
	    long *ret);

#endif
