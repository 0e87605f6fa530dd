#define _GNU_SOURCE
#include "dump_session.h"

#include <cpuid.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

#include "common/inject.h"
#include "dump_task.h"

#define RED_ZONE 128		/* x86_64 psABI 3.2.2 */
#define USER_CS 0x33		/* code segment of 64-bit user mode */
#define SYSCALL_INSN_SIZE 2

/* Internal to the kernel (include/linux/errno.h): values of rax that make it restart a system call. */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

/* The kernel's struct rt_sigframe and its parts (asm/sigframe.h, asm/sigcontext.h, asm/ucontext.h). */
struct sigcontext_frame {
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

struct signal_frame {
	uint64_t return_ip;
	uint64_t uc_flags, uc_link;
	struct {
		uint64_t sp;
		int32_t flags, pad;
		uint64_t size;
	} stack;
	struct sigcontext_frame context;
	uint64_t mask;
	unsigned char siginfo[128];
};

#define UC_FP_XSTATE 1
#define UC_SIGCONTEXT_SS 2
#define UC_STRICT_RESTORE_SS 4
#define BAD_SS_FLAGS 0x55 /* rt_sigreturn ignores an invalid sigaltstack: so the real one stays as it is */

/* Software bytes in the legacy part of an xsave area of a signal frame (struct _fpx_sw_bytes). */
struct xsave_note {
	uint32_t magic1, extended_size;
	uint64_t features;
	uint32_t size, padding[7];
};

#define XSAVE_NOTE 464
#define XSAVE_HEADER 512
#define XSAVE_MIN (512 + 64)
#define XSAVE_MAGIC1 0x46505853u
#define XSAVE_MAGIC2 0x46505845u
#define XFEATURES_AMX (3ULL << 17) /* not in a frame until the task has requested them, arch_prctl(2) */

/* struct rseq_cs of linux/rseq.h. */
struct rseq_section {
	uint32_t version, flags;
	uint64_t start, post_commit_offset, abort_ip;
};
#define RSEQ_CS_FIELD 8

int lp_find_gadgets(pid_t pid, uint64_t start, uint64_t end, struct lp_gadgets *gadgets)
{
	static const struct {
		const char *bytes;
		size_t size;
	} sigreturns[] = { { "\x48\xc7\xc0\x0f\0\0\0\x0f\x05", 9 }, { "\xb8\x0f\0\0\0\x0f\x05", 7 } };
	int rc = 0;

	if (!gadgets->syscall_ip)
		rc = lp_find_bytes(pid, start, end, "\x0f\x05\xc3", 3, &gadgets->syscall_ip);
	for (int i = 0; i < 2 && !gadgets->sigreturn_ip && (rc == 0 || rc == -ENOENT); i++)
		rc = lp_find_bytes(pid, start, end, sigreturns[i].bytes, sigreturns[i].size, &gadgets->sigreturn_ip);
	if (rc && rc != -ENOENT)
		return rc;
	return gadgets->syscall_ip && gadgets->sigreturn_ip ? 0 : -ENOENT;
}

int lp_settled_regs(pid_t tid, struct user_regs_struct *regs)
{
	struct lp_rseq rseq;
	struct rseq_section section;
	uint64_t pointer;
	int rc = lp_get_regs(tid, regs);

	if (rc)
		return rc;
	rc = lp_rseq(tid, &rseq);
	if (rc || !rseq.address)
		return rc;
	rc = lp_read_memory(tid, rseq.address + RSEQ_CS_FIELD, &pointer, sizeof(pointer));
	if (rc || !pointer)
		return rc;
	rc = lp_read_memory(tid, pointer, &section, sizeof(section));
	if (rc)
		return rc;
	if (regs->rip - section.start < section.post_commit_offset)
		regs->rip = section.abort_ip;
	return 0;
}

void lp_rewind_syscall(struct user_regs_struct *regs)
{
	if ((long)regs->orig_rax < 0)
		return;
	switch (-(long)regs->rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
	case ERESTART_RESTARTBLOCK:
		regs->rax = regs->orig_rax;
		regs->rip -= SYSCALL_INSN_SIZE;
	}
}

void lp_xstate_component(int nr, uint32_t *offset, uint32_t *size)
{
	uint32_t ecx, edx;

	__cpuid_count(13, nr, *size, *offset, ecx, edx);
}

/* Size in bytes of an xsave area with these features in the standard layout. */
static uint32_t xsave_size(uint64_t features)
{
	uint32_t end = XSAVE_MIN;

	for (int nr = 2; nr < 63; nr++) {
		uint32_t offset, size;

		if (!(features & 1ULL << nr))
			continue;
		lp_xstate_component(nr, &offset, &size);
		if (offset + size > end)
			end = offset + size;
	}
	return end;
}

static void fill_frame(struct signal_frame *frame, const struct user_regs_struct *regs, uint64_t mask,
		       uint64_t fpstate, uint64_t return_ip)
{
	struct sigcontext_frame *c = &frame->context;

	memset(frame, 0, sizeof(*frame));
	frame->return_ip = return_ip;
	frame->uc_flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS;
	frame->stack.flags = BAD_SS_FLAGS;
	frame->mask = mask;
	c->r8 = regs->r8;
	c->r9 = regs->r9;
	c->r10 = regs->r10;
	c->r11 = regs->r11;
	c->r12 = regs->r12;
	c->r13 = regs->r13;
	c->r14 = regs->r14;
	c->r15 = regs->r15;
	c->di = regs->rdi;
	c->si = regs->rsi;
	c->bp = regs->rbp;
	c->bx = regs->rbx;
	c->dx = regs->rdx;
	c->ax = regs->rax;
	c->cx = regs->rcx;
	c->sp = regs->rsp;
	c->ip = regs->rip;
	c->flags = regs->eflags;
	c->cs = regs->cs;
	c->ss = regs->ss;
	c->fpstate = fpstate;
}

/*
 * Lays out, from `end` downwards: xsave area, frame, scratch. Builds the contents of the first two in `image`, which
 * ends where the xsave area ends.
 */
static int prepare(struct lp_session *s, const struct lp_gadgets *gadgets, uint64_t end,
		   unsigned char image[LP_SESSION_ROOM], uint64_t *frame_address, uint64_t *image_size)
{
	struct user_regs_struct back = s->saved;
	struct signal_frame frame;
	struct xsave_note note = { .magic1 = XSAVE_MAGIC1 };
	uint64_t features, used, fpstate;
	const uint32_t magic2 = XSAVE_MAGIC2;
	unsigned char xsave[LP_SESSION_ROOM];
	size_t got = sizeof(xsave);
	int rc = lp_get_xstate(s->tid, xsave, &got);

	if (rc)
		return rc;
	if (got < XSAVE_MIN)
		return -ENOTSUP;
	memcpy(&features, xsave + XSAVE_NOTE, sizeof(features));
	memcpy(&used, xsave + XSAVE_HEADER, sizeof(used));
	features &= ~(XFEATURES_AMX & ~used);
	note.features = features;
	note.size = xsave_size(features);
	note.extended_size = note.size + sizeof(magic2);
	if (note.size > got)
		return -ENOTSUP;
	memcpy(xsave + XSAVE_NOTE, &note, sizeof(note));

	fpstate = (end - note.extended_size) & ~63ULL;
	*frame_address = ((fpstate - sizeof(frame)) & ~15ULL) - 8;
	s->scratch = (*frame_address - LP_SCRATCH_SIZE) & ~63ULL;
	s->kept_start = s->scratch;
	s->kept_size = end - s->scratch;
	*image_size = end - *frame_address;
	if (s->kept_size > LP_SESSION_ROOM)
		return -ENOTSUP;

	lp_rewind_syscall(&back);
	fill_frame(&frame, &back, s->mask, fpstate, gadgets->sigreturn_ip);
	memset(image, 0, *image_size);
	memcpy(image, &frame, sizeof(frame));
	memcpy(image + (fpstate - *frame_address), xsave, note.size);
	memcpy(image + (fpstate - *frame_address) + note.size, &magic2, sizeof(magic2));
	return 0;
}

/*
 * Makes the kernel extend the stack down to `address`, as an access by the thread itself would: unlike
 * process_vm_readv, ptrace does that (__access_remote_vm() in mm/memory.c).
 */
static int grow_stack(pid_t tid, uint64_t address)
{
	errno = 0;
	ptrace(PTRACE_PEEKDATA, tid, (void *)address, NULL);
	return errno == 0 ? 0 : errno == ESRCH ? -ESRCH : -EFAULT;
}

int lp_session_begin(struct lp_session *s, pid_t tid, const struct lp_gadgets *gadgets, uint64_t room)
{
	unsigned char image[LP_SESSION_ROOM];
	uint64_t frame_address = 0, image_size = 0;
	int rc;

	s->tid = tid;
	s->syscall_ip = gadgets->syscall_ip;
	rc = lp_settled_regs(tid, &s->saved);
	if (!rc && s->saved.cs != USER_CS)
		rc = -ENOTSUP;
	if (!rc)
		rc = lp_get_sigmask(tid, &s->mask);
	if (!rc)
		rc = prepare(s, gadgets, room ? room : s->saved.rsp - RED_ZONE, image, &frame_address, &image_size);
	if (!rc)
		rc = lp_read_memory(tid, s->kept_start, s->kept, s->kept_size);
	if (rc == -EFAULT) {
		rc = grow_stack(tid, room ? room - LP_SESSION_ROOM : s->kept_start);
		if (!rc)
			rc = lp_read_memory(tid, s->kept_start, s->kept, s->kept_size);
	}
	if (!rc)
		rc = lp_write_memory(tid, frame_address, image, image_size);
	if (rc)
		return rc;

	/* From here on a thread whose tracer dies calls getpid and returns to its own state. */
	s->base = s->saved;
	s->base.rsp = frame_address;
	s->base.rip = s->syscall_ip;
	s->base.rax = SYS_getpid;
	s->base.orig_rax = -1;
	rc = lp_set_regs(tid, &s->base);
	if (!rc)
		rc = lp_set_sigmask(tid, ~0ULL);
	if (rc)
		lp_session_end(s);
	return rc;
}

int lp_session_call(struct lp_session *s, long nr, const uint64_t args[6], long *ret)
{
	return lp_call(s->tid, &s->base, s->syscall_ip, nr, args, ret);
}

int lp_session_end(struct lp_session *s)
{
	int rc = lp_set_sigmask(s->tid, s->mask);

	/* The frame is needed until this has succeeded. */
	if (!rc)
		rc = lp_set_regs(s->tid, &s->saved);
	if (!rc)
		rc = lp_write_memory(s->tid, s->kept_start, s->kept, s->kept_size);
	return rc;
}
