/*
 * A plan for the restorer: what is accepted is executed to its end or its first failure, here without any effect: what the
 * restorer asks of the kernel or of tasks is answered by the rest of the input.
 *
 * An input is a plan, as long as its header says, and then the answers: one byte each, 0 for success.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/inject.h"
#include "restore/check_plan.h"
#include "restore/restore_plan.h"

#include "fuzz.h"

#define MOST ((uint64_t)1 << 20) /* bytes of shared memory */

static struct input answers;
static uint64_t sum; /* of all that was handed over: it must be there to be read */

static void look_at(const void *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		sum += ((const uint8_t *)bytes)[i];
}

/* 0, or -1 with an errno, or what else a call gives that succeeds. */
static long result(long good)
{
	uint8_t byte = take(&answers);

	if (byte < 200)
		return good;
	errno = byte - 199;
	return -1;
}

static long any(void)
{
	return result(3 + take(&answers) % 8);
}

static long fuzz_write(const void *bytes, size_t size)
{
	look_at(bytes, size);
	return result((long)size) < 0 ? -1 : (long)size; /* who gets EINTR for ever tries for ever */
}

static void *fuzz_map(size_t size)
{
	void *place = size && size <= MOST && !result(0) ? calloc(1, size) : NULL;

	return place ? place : MAP_FAILED;
}

static long fuzz_preadv(const struct iovec *iov, int nr)
{
	size_t size = 0;

	for (int i = 0; i < nr; i++) {
		memset(iov[i].iov_base, 1, iov[i].iov_len);
		size += iov[i].iov_len;
	}
	return result((long)size);
}

static long fuzz_waitpid(int *status)
{
	uint8_t byte = take(&answers);

	if (!answers.left || byte == 255) {
		errno = ECHILD;
		return -1;
	}
	if (status)
		*status = byte & 1 ? byte << 8 : byte & 0x7f;
	return 1;
}

static long fuzz_kill(long pid)
{
	CHECK(pid > 0); /* all others are for more than one process */
	return result(0);
}

static long fuzz_path(const char *path)
{
	look_at(path, strlen(path) + 1);
	return any();
}

static long fuzz_message(const struct msghdr *message)
{
	look_at(message->msg_iov->iov_base, message->msg_iov->iov_len);
	look_at(message->msg_control, message->msg_controllen);
	return result((long)message->msg_iov->iov_len);
}

static int fuzz_pipe(int *ends)
{
	ends[0] = 5;
	ends[1] = 6;
	return (int)result(0);
}

/* Of common/inject.c. */
int lp_seize(pid_t tid) { CHECK(tid > 0); return (int)result(0) < 0 ? -errno : 0; }
int lp_set_options(pid_t tid, uint64_t options) { (void)options; return lp_seize(tid); }
int lp_interrupt_wait(pid_t tid) { return lp_seize(tid); }
int lp_detach(pid_t tid) { return lp_seize(tid); }
int lp_set_sigmask(pid_t tid, uint64_t mask) { (void)mask; return lp_seize(tid); }

int lp_wait_stop(pid_t tid, int *group_stop)
{
	if (group_stop)
		*group_stop = 0;
	return lp_seize(tid);
}

int lp_get_regs(pid_t tid, struct user_regs_struct *regs)
{
	memset(regs, 0, sizeof(*regs));
	return lp_seize(tid);
}

int lp_set_regs(pid_t tid, const struct user_regs_struct *regs)
{
	look_at(regs, sizeof(*regs));
	return lp_seize(tid);
}

int lp_get_xstate(pid_t tid, void *buf, size_t *size)
{
	memset(buf, 0xff, *size);
	*size = 4096 < *size ? 4096 : *size;
	return lp_seize(tid);
}

int lp_set_xstate(pid_t tid, const void *buf, size_t size)
{
	look_at(buf, size);
	return lp_seize(tid);
}

int lp_write_memory(pid_t pid, uint64_t address, const void *local, size_t size)
{
	(void)address;
	look_at(local, size);
	return lp_seize(pid);
}

int lp_call(pid_t tid, const struct user_regs_struct *base, uint64_t ip, long nr, const uint64_t args[6], long *ret)
{
	(void)ip, (void)nr;
	look_at(base, sizeof(*base));
	look_at(args, 6 * sizeof(*args));
	*ret = result(take(&answers));
	return lp_seize(tid);
}

#define open(path, ...) (int)fuzz_path(path)
#define pipe2(ends, flags) fuzz_pipe(ends)
#define fcntl(...) (int)any()
#define lseek(...) result(0)
#define write(fd, bytes, size) fuzz_write(bytes, size)
#define close(fd) (void)(fd)
#define mmap(place, size, ...) fuzz_map(size)
#define munmap(place, size) free(place)
#define sendmsg(fd, message, flags) fuzz_message(message)
#define ioctl(...) (int)result(0)
#define syscall(nr, ...) ((nr) == SYS_clone3 ? 77 : any())
#define kill(pid, signo) (int)fuzz_kill(pid)
#define waitpid(pid, status, options) (pid_t)fuzz_waitpid(status)
#define prctl(...) (int)result(0)
#define ptrace(...) result(0)
#define preadv(fd, iov, nr, offset) fuzz_preadv(iov, (int)(nr))
#define sigaction(...) (int)result(0)
#define sigprocmask(...) (void)0
#define main restorer_main

#include "restore/restore_task.c"
#include "uffd_restorer.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint64_t *plan = malloc(size + 8); /* aligned, as a file that is mapped */
	struct lp_restorer *r = &restorer;
	const struct lp_plan *head = (const void *)plan;

	memcpy(plan, data, size);
	if (lp_check_plan(plan, size)) {
		free(plan);
		return 0;
	}
	answers = (struct input){data + head->size, size - head->size};
	plan = realloc(plan, head->size);
	*r = (struct lp_restorer){.plan = *(const struct lp_plan *)plan};
	r->threads = calloc(r->plan.nr_threads + 1, sizeof(*r->threads));
	r->slots = malloc((r->plan.nr_slots + 1) * sizeof(*r->slots));
	r->shared = calloc(r->plan.nr_slots + 1, sizeof(*r->shared));
	r->sizes = calloc(r->plan.nr_slots + 1, sizeof(*r->sizes));
	memset(r->slots, -1, (r->plan.nr_slots + 1) * sizeof(*r->slots));
	r->nr_special = 2;
	r->special[0] = (struct lp_place){0x7fff00000000, 0x4000};
	r->special[1] = (struct lp_place){0x7fff00004000, 0x2000};
	interrupted = 0;
	run((const char *)plan);
	for (uint32_t i = 0; i < r->plan.nr_slots; i++)
		free(r->shared[i]);
	free(r->threads);
	free(r->slots);
	free(r->shared);
	free(r->sizes);
	free(plan);
	return 0;
}
