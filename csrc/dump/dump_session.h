/*
 * System calls run by a stopped task, which is not harmed if the tracer dies at any moment.
 *
 * When a tracer is killed, the task runs on with its current registers.  So before registers are changed, a signal
 * frame with the whole state of the thread is written to the task's memory, and every injected system call returns
 * into rt_sigreturn through it: a thread whose tracer has died completes its current, harmless call and continues
 * where it was.  The price of that path: an interrupted call with a time-out starts its time-out anew.
 *
 * The frame is placed where the caller says: in memory that was never used (dumptool/tracee.py, find_room), because
 * it stays there if the tracer is killed.  If there is none, below the red zone of the thread's own stack, where the
 * kernel may write a signal frame at any time; this overwrites foreign data if the program uses a very small stack.
 * On the ordinary path ptrace restores everything, including these bytes; only a stack that had to grow for the frame
 * stays larger.
 */
#ifndef LAZYPAGES_DUMP_SESSION_H
#define LAZYPAGES_DUMP_SESSION_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#define LP_SCRATCH_SIZE 4096 /* bytes for arguments and results of the calls */
#define LP_SESSION_ROOM 24576 /* scratch, frame and the largest xsave area (11 KiB with AMX) */

struct lp_session {
	pid_t tid;
	uint64_t syscall_ip; /* address of `syscall; ret` */
	uint64_t scratch;    /* address in the task of LP_SCRATCH_SIZE bytes */
	uint64_t kept_start; /* address of the bytes saved in kept */
	uint64_t kept_size;
	uint64_t mask;
	struct user_regs_struct saved;
	struct user_regs_struct base;
	unsigned char kept[LP_SESSION_ROOM];
};

/* The code that a session needs: addresses in executable memory of the task. */
struct lp_gadgets {
	uint64_t syscall_ip;   /* syscall; ret */
	uint64_t sigreturn_ip; /* mov $15, %eax or %rax; syscall */
};

/*
 * Searches [start, end) for the members of *gadgets that are 0. Returns 0 if both are known then, -ENOENT if not, or
 * the -errno of reading the memory.
 */
int lp_find_gadgets(pid_t pid, uint64_t start, uint64_t end, struct lp_gadgets *gadgets);

/*
 * The registers of a stopped thread, after what the kernel would do before it returns to user mode: leave a
 * restartable sequence (rseq) for its abort handler.
 */
int lp_settled_regs(pid_t tid, struct user_regs_struct *regs);

/*
 * Changes registers with which rt_sigreturn will resume a thread, so that a system call interrupted by a signal or
 * stop is made again.
 */
void lp_rewind_syscall(struct user_regs_struct *regs);

/* Offset and size in bytes of component nr (2 to 62) in an xsave area of the standard layout; size 0: not in this CPU. */
void lp_xstate_component(int nr, uint32_t *offset, uint32_t *size);

/*
 * Begins a session. room: the end address of LP_SESSION_ROOM usable bytes, to which the main stack may have to grow; 0:
 * use the memory below the stack pointer. -EFAULT: that memory is not there. -ENOTSUP: not a 64-bit thread, or its
 * xsave area is too large. The thread is unchanged after an error.
 */
int lp_session_begin(struct lp_session *session, pid_t tid, const struct lp_gadgets *gadgets, uint64_t room);

/* See lp_call() in inject.h. */
int lp_session_call(struct lp_session *session, long nr, const uint64_t args[6], long *ret);

/* Ends a session: restores everything. The thread stays stopped. */
int lp_session_end(struct lp_session *session);

#endif
