#define _GNU_SOURCE
#include "restore_task.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/inject.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

#define ADDRESS_LIMIT 0x7ffffffff000ULL /* TASK_SIZE_MAX with four-level page tables: no user mapping is higher */
#define MAX_IOVS 1024			/* UIO_MAXIOV */
#define MAX_READ (1ULL << 30)		/* one preadv; the kernel's limit is 2 GiB - 4 KiB */
#define XSTATE_ROOM 65536
#define XSTATE_HEADER 512		/* the xsave header follows the fxsave area; xstate_bv is its first word */
#define XSTATE_XCR0 464			/* offset in the area that ptrace returns */

static uint64_t scratch_data(const struct lp_restorer *r)
{
	return r->plan.scratch + LP_SCRATCH_CODE;
}

static uint64_t scratch_size(const struct lp_restorer *r)
{
	return LP_SCRATCH_CODE + LP_SCRATCH_DATA + r->plan.parking;
}

/* Finds vvar and vdso of the restorer; tasks inherit them at the same addresses. */
static int find_special(struct lp_restorer *r)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512], name[64];
	uint64_t start, end;

	if (!maps)
		return -errno;
	while (fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %*s %*s %*s %*s %63s", &start, &end, name) != 3)
			continue;
		if (strncmp(name, "[vvar", 5) && strcmp(name, "[vdso]"))
			continue;
		if (r->nr_special == LP_MAX_SPECIAL) {
			fclose(maps);
			return -E2BIG;
		}
		r->special[r->nr_special++] = (struct lp_place){ start, end - start };
	}
	fclose(maps);
	return 0;
}

int lp_prepare(struct lp_restorer *r)
{
	static const unsigned char code[] = { 0x0f, 0x05 }; /* syscall */
	void *scratch = mmap((void *)r->plan.scratch, scratch_size(r), PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	int pidfd, rc;

	if (scratch == MAP_FAILED)
		return -errno;
	memcpy(scratch, code, sizeof(code));
	if (mprotect(scratch, LP_SCRATCH_CODE, PROT_READ | PROT_EXEC))
		return -errno;
	rc = find_special(r);
	if (rc)
		return rc;
	pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	if (pidfd < 0)
		return -errno;
	if (pidfd != (int)r->plan.link_fd) {
		if (fcntl(r->plan.link_fd, F_GETFD) >= 0) /* a descriptor of the restorer's has this number */
			return -EBUSY;
		if (dup3(pidfd, r->plan.link_fd, O_CLOEXEC) < 0)
			return -errno;
		close(pidfd);
	}
	return 0;
}

int lp_run(struct lp_restorer *r, uint32_t index, long nr, const uint64_t args[6], long *ret)
{
	struct lp_thread *thread = &r->threads[index];

	return lp_call(thread->tid, &thread->base, r->plan.scratch, nr, args, ret);
}

int lp_must(struct lp_restorer *r, uint32_t index, long nr, const uint64_t args[6], long *ret)
{
	long result;
	int rc = lp_run(r, index, nr, args, &result);

	if (rc)
		return rc;
	if (result < 0 && result >= -4095)
		return result;
	if (ret)
		*ret = result;
	return 0;
}

#define CALL(r, index, nr, ...) lp_must(r, index, nr, (const uint64_t[6]){ __VA_ARGS__ }, NULL)
#define CALL_RESULT(ret, r, index, nr, ...) lp_must(r, index, nr, (const uint64_t[6]){ __VA_ARGS__ }, ret)

static int put_data(struct lp_restorer *r, uint32_t index, const void *data, size_t size)
{
	if (size > LP_SCRATCH_DATA)
		return -E2BIG;
	return size ? lp_write_memory(r->threads[index].tid, scratch_data(r), data, size) : 0;
}

/* Creates the first task, a child of the restorer.  It sleeps until it is seized. */
static int spawn_root(struct clone_args *args, pid_t *made)
{
	pid_t parent = getpid();
	sigset_t all, before;
	long pid;
	int rc;

	/* The task must not receive signals; it inherits this mask. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	pid = syscall(SYS_clone3, args, sizeof(*args));
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL); /* until PTRACE_O_EXITKILL is set */
		if (getppid() != parent)
			_exit(1);
		for (;;)
			pause();
	}
	rc = pid < 0 ? -errno : 0;
	if (!rc)
		*made = pid;
	sigprocmask(SIG_SETMASK, &before, NULL);
	if (!rc)
		rc = lp_seize(pid);
	if (!rc)
		rc = lp_interrupt_wait(pid);
	if (!rc)
		rc = lp_set_options(pid, PTRACE_O_EXITKILL);
	return rc;
}

int lp_spawn(struct lp_restorer *r, uint32_t index, const struct lp_spawn *spawn)
{
	struct lp_thread *thread = &r->threads[index];
	struct {
		struct clone_args args;
		pid_t tid;
	} data = { .args = { .flags = spawn->flags, .set_tid_size = 1 }, .tid = spawn->tid };
	bool is_thread = spawn->flags & CLONE_THREAD;
	int rc;

	data.args.exit_signal = is_thread ? 0 : SIGCHLD;
	if (spawn->parent == LP_NONE) {
		data.args.set_tid = (uintptr_t)&data.tid;
		rc = spawn_root(&data.args, &thread->tid);
	} else {
		data.args.set_tid = scratch_data(r) + offsetof(typeof(data), tid);
		/* CLONE_PTRACE: the new task has the same tracer and options, and starts stopped. */
		data.args.flags |= CLONE_PTRACE;
		rc = put_data(r, spawn->parent, &data, sizeof(data));
		if (!rc)
			rc = CALL(r, spawn->parent, SYS_clone3, scratch_data(r), sizeof(data.args));
		if (!rc) {
			thread->tid = spawn->tid;
			rc = lp_wait_stop(spawn->tid, NULL);
		}
	}
	if (!rc)
		rc = lp_get_regs(thread->tid, &thread->base);
	thread->base.rsp = scratch_data(r) + LP_SCRATCH_DATA;
	thread->leader = is_thread ? r->threads[spawn->parent].leader : index;
	return rc;
}

int lp_do_call(struct lp_restorer *r, uint32_t index, const struct lp_call_body *call, const void *data, size_t size)
{
	long result;
	int rc = put_data(r, index, data, size);

	if (!rc)
		rc = lp_must(r, index, call->nr, call->args, &result);
	if (!rc && call->exact && (uint64_t)result != call->result)
		rc = -EPROTO;
	return rc;
}

int lp_do_give(struct lp_restorer *r, uint32_t index, const struct lp_give *give)
{
	long fd;
	int rc = CALL_RESULT(&fd, r, index, SYS_pidfd_getfd, r->plan.link_fd, r->slots[give->slot]);

	if (rc)
		return rc;
	if (fd == (long)give->fd) /* pidfd_getfd(2) has set FD_CLOEXEC */
		return give->cloexec ? 0 : CALL(r, index, SYS_fcntl, fd, F_SETFD, 0);
	rc = CALL(r, index, SYS_dup3, fd, give->fd, give->cloexec ? O_CLOEXEC : 0);
	return rc ? rc : CALL(r, index, SYS_close, fd);
}

int lp_do_switch(struct lp_restorer *r, uint32_t index, const struct lp_place *places, uint32_t count)
{
	uint64_t parking = scratch_data(r) + LP_SCRATCH_DATA, end = r->plan.scratch + scratch_size(r);
	uint64_t parked[LP_MAX_SPECIAL];
	int rc = 0;

	if (count && count != r->nr_special)
		return -EINVAL;
	for (uint32_t i = 0; i < count && !rc; i++) {
		uint64_t size = r->special[i].size;

		if (size != places[i].size || parking + size > end)
			return -EINVAL;
		rc = CALL(r, index, SYS_mremap, r->special[i].start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, parking);
		parked[i] = parking;
		parking += size;
	}
	if (!rc)
		rc = CALL(r, index, SYS_munmap, 0, r->plan.scratch);
	if (!rc)
		rc = CALL(r, index, SYS_munmap, end, ADDRESS_LIMIT - end);
	for (uint32_t i = 0; i < count && !rc; i++)
		rc = CALL(r, index, SYS_mremap, parked[i], places[i].size, places[i].size,
			  MREMAP_MAYMOVE | MREMAP_FIXED, places[i].start);
	return rc;
}

/* Reads that are adjacent in one pages file. */
struct batch {
	struct lp_restorer *r;
	uint32_t index;
	int fd;
	struct iovec iovs[MAX_IOVS];
	uint32_t count;
	uint64_t offset, size;
};

static int flush(struct batch *b)
{
	struct lp_restorer *r = b->r;
	long got;
	int rc = 0;

	if (!b->count)
		return 0;
	if (b->index == LP_NONE) {
		got = preadv(b->fd, b->iovs, b->count, b->offset);
		rc = got < 0 ? -errno : 0;
	} else {
		rc = put_data(r, b->index, b->iovs, b->count * sizeof(*b->iovs));
		if (!rc)
			rc = CALL_RESULT(&got, r, b->index, SYS_preadv, b->fd, scratch_data(r), b->count, b->offset);
	}
	if (!rc && (uint64_t)got != b->size)
		rc = -EPROTO; /* the pages file is too short */
	b->count = 0;
	b->size = 0;
	return rc;
}

static int add(struct batch *b, uint64_t address, uint64_t size, uint64_t offset)
{
	while (size) {
		uint64_t part = size < MAX_READ ? size : MAX_READ;

		if (b->count == MAX_IOVS || b->size + part > MAX_READ || (b->count && b->offset + b->size != offset)) {
			int rc = flush(b);

			if (rc)
				return rc;
		}
		if (!b->count)
			b->offset = offset;
		b->iovs[b->count++] = (struct iovec){ (void *)address, part };
		b->size += part;
		address += part;
		offset += part;
		size -= part;
	}
	return 0;
}

/* Reads the pages that level `level` has. */
static int fill_level(struct batch *b, uint32_t level, const struct lp_fill_range *ranges, uint64_t nr_ranges,
		      const struct lp_extent *extents, uint64_t nr_extents, uint64_t bias)
{
	uint64_t i = 0;

	for (uint64_t k = 0; k < nr_extents; k++) {
		const struct lp_extent *e = &extents[k];
		uint64_t end = lp_extent_end(e), covered = 0;

		if (e->source != level)
			continue;
		while (i < nr_ranges && ranges[i].end <= e->start)
			i++;
		for (uint64_t j = i; j < nr_ranges && ranges[j].start < end; j++) {
			uint64_t lo = e->start > ranges[j].start ? e->start : ranges[j].start;
			uint64_t hi = end < ranges[j].end ? end : ranges[j].end;
			int rc;

			covered += hi - lo;
			if (!(ranges[j].take & (e->lazy ? LP_TAKE_LAZY : LP_TAKE_EAGER)))
				continue;
			rc = add(b, lo + bias, hi - lo, e->offset + (lo - e->start));
			if (rc)
				return rc;
		}
		if (covered != end - e->start)
			return -ERANGE; /* pages outside of all ranges */
	}
	return flush(b);
}

int lp_do_fill(struct lp_restorer *r, uint32_t index, const struct lp_fill *fill)
{
	const uint32_t *levels = (const void *)(fill + 1);
	const struct lp_fill_range *ranges = (const void *)(levels + (fill->nr_levels + 1) / 2 * 2);
	const struct lp_extent *extents = (const void *)(ranges + fill->nr_ranges);
	uint64_t bias = index == LP_NONE ? (uintptr_t)r->shared[fill->shared] : 0;
	struct batch *b = malloc(sizeof(*b));
	int rc = 0;

	if (!b)
		return -ENOMEM;
	for (uint32_t level = 0; level < fill->nr_levels && !rc; level++) {
		if (levels[level] == LP_NONE)
			continue;
		*b = (struct batch){ .r = r, .index = index };
		if (index == LP_NONE)
			b->fd = r->slots[levels[level]];
		else
			rc = lp_do_give(r, index, &(struct lp_give){ .slot = levels[level], .fd = 0 });
		if (!rc)
			rc = fill_level(b, level, ranges, fill->nr_ranges, extents, fill->nr_extents, bias);
		if (!rc && index != LP_NONE)
			rc = CALL(r, index, SYS_close, 0);
	}
	free(b);
	return rc;
}

/* Waits for the end of a process. This is the tracer's wait: it leaves a zombie for the parent. */
static int wait_end(struct lp_restorer *r, uint32_t index)
{
	int status;

	for (;;) {
		pid_t got = waitpid(r->threads[index].tid, &status, __WALL);
		long signo;

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (!WIFSTOPPED(status))
			return status;
		signo = status >> 16 ? 0 : WSTOPSIG(status); /* a ptrace event, or a signal to be delivered */
		if (ptrace(PTRACE_CONT, got, 0, signo) < 0 && errno != ESRCH)
			return -errno;
	}
}

int lp_do_exit(struct lp_restorer *r, uint32_t index, int status)
{
	struct lp_thread *thread = &r->threads[index];
	int rc;

	if (WIFEXITED(status)) {
		long result;

		rc = lp_run(r, index, SYS_exit_group, (const uint64_t[6]){ WEXITSTATUS(status) }, &result);
		/* -ESRCH: the process has exited, and lp_call has reaped it as its tracer. */
		rc = rc == -ESRCH ? 0 : rc ? rc : -EPROTO;
	} else {
		int signo = WTERMSIG(status);

		/* The dumped process has written its core file already. */
		rc = CALL(r, index, SYS_prctl, PR_SET_DUMPABLE, 0);
		if (!rc)
			rc = lp_set_sigmask(thread->tid, 0);
		if (!rc && kill(thread->tid, signo))
			rc = -errno;
		if (!rc && ptrace(PTRACE_CONT, thread->tid, 0, 0) < 0 && errno != ESRCH)
			rc = -errno;
		if (!rc) {
			rc = wait_end(r, index);
			rc = rc < 0 ? rc : WIFSIGNALED(rc) && WTERMSIG(rc) == signo ? 0 : -EPROTO;
		}
	}
	if (!rc)
		thread->tid = 0;
	return rc;
}

int lp_do_reap(struct lp_restorer *r, uint32_t index, uint32_t helper)
{
	struct lp_thread *thread = &r->threads[helper];
	pid_t pid = thread->tid;
	long got;
	int rc;

	if (kill(pid, SIGKILL))
		return -errno;
	rc = wait_end(r, helper);
	if (rc < 0)
		return rc;
	thread->tid = 0;
	rc = CALL_RESULT(&got, r, index, SYS_wait4, pid, 0, __WALL, 0);
	return rc ? rc : got == pid ? 0 : -EPROTO;
}

int lp_do_drain(struct lp_restorer *r, uint32_t index)
{
	const uint64_t data[] = { ~0ULL, 0, 0 }; /* all signals; time-out 0 */
	int rc = put_data(r, index, data, sizeof(data));

	/* Every signal, a real-time signal as often as it is queued. */
	for (int i = 0; i < 65536 && !rc; i++) {
		rc = CALL(r, index, SYS_rt_sigtimedwait, scratch_data(r), 0, scratch_data(r) + 8, 8);
		if (rc == -EAGAIN)
			return 0;
	}
	return rc ? rc : -EPROTO;
}

static int set_xstate(struct lp_thread *thread, const struct lp_regs *regs, size_t size)
{
	static unsigned char area[XSTATE_ROOM] __attribute__((aligned(64)));
	const unsigned char *place = (const unsigned char *)(regs + 1), *end = (const unsigned char *)regs + size;
	size_t room = sizeof(area);
	uint64_t xcr0;
	int rc = lp_get_xstate(thread->tid, area, &room);

	if (rc)
		return rc;
	memcpy(&xcr0, area + XSTATE_XCR0, sizeof(xcr0));
	if (regs->xstate_bv & ~xcr0)
		return -ENOTSUP;
	memset(area, 0, room);
	memcpy(area, regs->fxsave, sizeof(regs->fxsave));
	memcpy(area + XSTATE_HEADER, &regs->xstate_bv, sizeof(regs->xstate_bv));
	while (place < end) {
		const struct lp_component *component = (const void *)place;
		unsigned int bytes, offset, ecx, edx;

		if (!__get_cpuid_count(0xd, component->nr, &bytes, &offset, &ecx, &edx) || bytes != component->size ||
		    offset + bytes > room)
			return -ENOTSUP;
		memcpy(area + offset, component + 1, bytes);
		place += sizeof(*component) + (component->size + 7) / 8 * 8;
	}
	return lp_set_xstate(thread->tid, area, room);
}

int lp_do_regs(struct lp_restorer *r, uint32_t index, const struct lp_regs *regs, size_t size)
{
	struct lp_thread *thread = &r->threads[index];
	struct user_regs_struct gp;
	int rc = set_xstate(thread, regs, size);

	_Static_assert(sizeof(gp) == sizeof(regs->gp), "struct user_regs_struct");
	memcpy(&gp, regs->gp, sizeof(gp));
	if (!rc)
		rc = lp_set_regs(thread->tid, &gp);
	if (!rc)
		rc = lp_set_sigmask(thread->tid, regs->blocked);
	thread->stop = regs->stop;
	return rc;
}
