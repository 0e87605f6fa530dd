/*
 * System calls run in a task that must come to no harm, whenever the tracer dies.
 *
 * A tracer that is killed leaves the task running with the registers of that moment.  So before a
 * register is touched, a signal frame that holds all of the thread's state is put into the task, and every injected
 * system call returns into rt_sigreturn through it: left alone at any instant, the thread finishes the harmless call
 * that it is in and is back where it was.  Cost of that way back: an interrupted timed wait starts its time-out anew.
 *
 * The frame goes where the caller says: into memory that nobody has ever used (dumptool/tracee.py, find_room), for what a
 * killed tracer has put there stays.  Where there is none, below the red zone of the thread's own stack, where the kernel
 * may write a frame at any time; unless the program has made itself a small stack, where that is somebody's memory.
 * On the ordinary way out everything, these bytes too, is put back by ptrace; but a stack that had no room
 * for the frame has grown.
 */
#ifndef LAZYPAGES_DUMP_SESSION_H
#define LAZYPAGES_DUMP_SESSION_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#define LP_SCRATCH_SIZE 4096 /* bytes for arguments and results of the calls */
#define LP_SESSION_ROOM 24576 /* scratch, frame and the largest xsave area (AMX: 11 KiB) */

struct lp_session {
	pid_t tid;
	uint64_t syscall_ip; /* of the bytes `syscall; ret` */
	uint64_t scratch;    /* address in the task of LP_SCRATCH_SIZE bytes */
	uint64_t kept_start; /* address of the bytes in kept */
	uint64_t kept_size;
	uint64_t mask;
	struct user_regs_struct saved;
	struct user_regs_struct base;
	unsigned char kept[LP_SESSION_ROOM];
};

/* The two pieces of code that a session needs, each an address in executable memory of the task. */
struct lp_gadgets {
	uint64_t syscall_ip;   /* syscall; ret */
	uint64_t sigreturn_ip; /* mov $15, %eax or %rax; syscall */
};

/*
 * Look for what is missing (0) of *gadgets in [start, end): 0 when both are known then, -ENOENT when not, or
 * the error of reading.
 */
int lp_find_gadgets(pid_t pid, uint64_t start, uint64_t end, struct lp_gadgets *gadgets);

/*
 * The registers of a stopped thread, with what the kernel itself would do before user mode: out of a
 * restartable sequence (rseq) to its abort handler.
 */
int lp_settled_regs(pid_t tid, struct user_regs_struct *regs);

/*
 * What a thread that is taken back to user mode from `regs` by sigreturn must have instead, so that a
 * system call that a signal or a stop has interrupted is called again.
 */
void lp_rewind_syscall(struct user_regs_struct *regs);

/* Where the CPU has component nr (2 to 62) in an xsave area of the standard layout, bytes; size 0: it has none. */
void lp_xstate_component(int nr, uint32_t *offset, uint32_t *size);

/*
 * room: the end of LP_SESSION_ROOM bytes to be used, to which the main stack may have to grow; 0: below the stack pointer.
 * -EFAULT: they are not there. -ENOTSUP: not a 64-bit thread. The thread is unchanged then.
 */
int lp_session_begin(struct lp_session *session, pid_t tid, const struct lp_gadgets *gadgets, uint64_t room);

/* Like lp_call. */
int lp_session_call(struct lp_session *session, long nr, const uint64_t args[6], long *ret);

/* Put everything back. The thread stays stopped. */
int lp_session_end(struct lp_session *session);

#endif
