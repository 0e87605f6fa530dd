/*
 * Restores dumped tasks without CRIU: executes a plan (restore_plan.h) made by lazypages/restore/.
 *
 *	uffd_restorer PLAN_FD
 *
 * Creates processes with the right pids, stopped under ptrace, and turns them into the dumped
 * tasks by running system calls in them; sets their registers last.  With a daemon, each task gets a
 * userfaultfd, which is sent to the daemon over its control socket, in CRIU's protocol
 * (docs/criu.md, "Control socket" and "Userfaultfds and lazy mappings").
 *
 * Until LP_GO every task ends with the restorer (PTRACE_O_EXITKILL), and any failure ends all tasks.
 * Exit code: 0, or that of the task that LP_WAIT names (128 + n if signal n killed it); 1 after a failure.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#endif
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/inject.h"
#include "restore/check_plan.h"
#include "common/write_all.h"
#include "restore/restore_task.h"

#define FINISHED 0x52535446u /* the last message on the control socket */
#define RSEQ_REGISTERED_SIZE 32
#define EVENTS \
	(UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

static struct lp_restorer restorer = { .plan = { .log_fd = -1 } };
static volatile sig_atomic_t interrupted; /* number of the signal, or 0 */

static void log_line(int fd, const char *format, ...)
{
	char line[8192];
	va_list args;
	int size;

	va_start(args, format);
	size = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (size < 0)
		return;
	if (size > (int)sizeof(line) - 2)
		size = sizeof(line) - 2;
	line[size++] = '\n';
	while (write(fd, line, size) < 0 && errno == EINTR)
		;
}

static void report_error(const char *subject, const char *step, const char *reason)
{
	log_line(STDERR_FILENO, "lazypages restore: %s: %s: %s", subject, step, reason);
	if (restorer.plan.log_fd >= 0)
		log_line(restorer.plan.log_fd, "Error: %s: %s: %s", subject, step, reason);
}

/* Kills all tasks: this also ends a wait for a task that waits for the daemon. */
static void on_signal(int signo)
{
	int saved = errno;

	interrupted = signo;
	for (uint32_t i = 0; i < restorer.plan.nr_threads; i++)
		if (restorer.threads[i].tid && restorer.threads[i].leader == i)
			kill(restorer.threads[i].tid, SIGKILL);
	errno = saved;
}

static const int END_SIGNALS[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM };

static void handle_signals(void (*handler)(int))
{
	struct sigaction action = { .sa_handler = handler };

	for (size_t i = 0; i < sizeof(END_SIGNALS) / sizeof(*END_SIGNALS); i++)
		sigaction(END_SIGNALS[i], &action, NULL);
}

/* Kills and reaps all tasks. Orphans become our children, see get_ready(). */
static void kill_all(void)
{
	for (uint32_t i = 0; i < restorer.plan.nr_threads; i++)
		if (restorer.threads[i].tid && restorer.threads[i].leader == i)
			kill(restorer.threads[i].tid, SIGKILL);
	while (waitpid(-1, NULL, __WALL) > 0 || errno == EINTR)
		;
}

/* --- files of the restorer --- */

static int keep(uint32_t slot, int fd)
{
	if (fd < 0)
		return -errno;
	restorer.slots[slot] = fd;
	return 0;
}

static int do_open(const struct lp_open *open_, const char *path)
{
	int rc = keep(open_->slot, open(path, open_->flags | O_CLOEXEC | O_NOCTTY));

	if (!rc && open_->position && lseek(restorer.slots[open_->slot], open_->position, SEEK_SET) < 0)
		rc = -errno;
	return rc;
}

static int do_pipe(const struct lp_pipe *pipe_, const char *contents, size_t size)
{
	int ends[2], rc;

	/* With O_NONBLOCK, contents that don't fit are an error instead of a hang. */
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
		return -errno;
	rc = keep(pipe_->reader, ends[0]);
	if (!rc)
		rc = keep(pipe_->writer, ends[1]);
	if (!rc && pipe_->capacity && fcntl(ends[1], F_SETPIPE_SZ, (int)pipe_->capacity) < 0)
		rc = -errno;
	return rc ? rc : lp_write_all(ends[1], contents, size);
}

static int do_reopen(const struct lp_reopen *reopen)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", restorer.slots[reopen->from]);
	return keep(reopen->slot, open(path, reopen->flags | O_CLOEXEC | O_NOCTTY));
}

static int do_shared(const struct lp_shared *shared)
{
	void *place = mmap(NULL, shared->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char path[128];

	if (place == MAP_FAILED)
		return -errno;
	restorer.shared[shared->slot] = place;
	restorer.sizes[shared->slot] = shared->size;
	snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (unsigned long)place,
		 (unsigned long)place + shared->size);
	return keep(shared->slot, open(path, O_RDWR | O_CLOEXEC));
}

static void close_slot(uint32_t slot)
{
	if (restorer.slots[slot] >= 0)
		close(restorer.slots[slot]);
	restorer.slots[slot] = -1;
	if (restorer.shared[slot])
		munmap(restorer.shared[slot], restorer.sizes[slot]);
	restorer.shared[slot] = NULL;
}

static int do_write(const struct lp_write *write_, const char *path, const char *text, size_t size)
{
	int fd = open(path, write_->flags | O_CLOEXEC, 0600), rc;

	if (fd < 0)
		return -errno;
	rc = lp_write_all(fd, text, size);
	close(fd);
	return rc;
}

/* --- the daemon --- */

/*
 * Sends a message with credentials of the task `pid`, for daemons with SO_PASSCRED (unix(7)); with the restorer's
 * own if pid is 0.  fd: sent along unless negative.
 */
static int send_message(const void *data, size_t size, pid_t pid, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct iovec iov = { .iov_base = (void *)data, .iov_len = size };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control };
	struct ucred credentials = { .pid = pid, .uid = geteuid(), .gid = getegid() };
	struct cmsghdr *header = &control.align;
	ssize_t sent;

	if (pid) {
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_CREDENTIALS;
		header->cmsg_len = CMSG_LEN(sizeof(credentials));
		memcpy(CMSG_DATA(header), &credentials, sizeof(credentials));
		message.msg_controllen += CMSG_SPACE(sizeof(credentials));
		header = (void *)(control.bytes + message.msg_controllen);
	}
	if (fd >= 0) {
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(fd));
		memcpy(CMSG_DATA(header), &fd, sizeof(fd));
		message.msg_controllen += CMSG_SPACE(sizeof(fd));
	}
	do
		sent = sendmsg(restorer.plan.control_fd, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR && !interrupted);
	if (sent < 0)
		return -errno;
	return (size_t)sent == size ? 0 : -EPROTO;
}

/* Finds which of the EVENTS this kernel supports. */
static int learn_features(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), rc;

	if (fd < 0)
		return -errno;
	rc = ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
	close(fd);
	restorer.uffd_features = api.features & EVENTS;
	return rc;
}

static int register_ranges(int fd, const struct lp_place *ranges, uint32_t count)
{
	struct uffdio_api api = { .api = UFFD_API, .features = restorer.uffd_features };

	if (ioctl(fd, UFFDIO_API, &api))
		return -errno;
	for (uint32_t i = 0; i < count; i++) {
		struct uffdio_register request = {
			.range = { .start = ranges[i].start, .len = ranges[i].size },
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};

		if (ioctl(fd, UFFDIO_REGISTER, &request))
			return -errno;
	}
	return 0;
}

static int do_uffd(uint32_t index, const struct lp_uffd *uffd)
{
	const struct lp_place *ranges = (const void *)(uffd + 1);
	long in_task;
	int pidfd, fd = -1;
	int rc = lp_must(&restorer, index, SYS_userfaultfd, (const uint64_t[6]){ O_CLOEXEC | O_NONBLOCK }, &in_task);

	if (rc)
		return rc;
	pidfd = syscall(SYS_pidfd_open, restorer.threads[index].tid, 0);
	if (pidfd < 0)
		return -errno;
	fd = syscall(SYS_pidfd_getfd, pidfd, (int)in_task, 0);
	rc = fd < 0 ? -errno : 0;
	close(pidfd);
	if (!rc)
		rc = register_ranges(fd, ranges, uffd->nr_ranges);
	if (!rc)
		rc = send_message(&uffd->pid, sizeof(uffd->pid), restorer.threads[index].tid, -1);
	if (!rc)
		rc = send_message("", 1, restorer.threads[index].tid, fd);
	if (fd >= 0)
		close(fd);
	return rc ? rc : lp_must(&restorer, index, SYS_close, (const uint64_t[6]){ in_task }, NULL);
}

static int do_announce(const struct lp_announce *announce)
{
	int32_t pid = -announce->pid;

	return send_message(&pid, sizeof(pid), 0, -1);
}

static int do_finish(void)
{
	uint32_t finished = FINISHED;

	return send_message(&finished, sizeof(finished), 0, -1);
}

/* --- all --- */

static int do_go(void)
{
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	for (uint32_t i = 0; i < restorer.plan.nr_slots; i++)
		close_slot(i); /* an open pipe end would keep the tasks from seeing its end of file */
	close(restorer.plan.link_fd);
	for (uint32_t i = 0; i < restorer.plan.nr_threads; i++) {
		struct lp_thread *thread = &restorer.threads[i];
		int rc;

		if (!thread->tid)
			continue;
		if (thread->stop && thread->leader == i && kill(thread->tid, SIGSTOP))
			return -errno;
		rc = lp_detach(thread->tid);
		/* ESRCH: it was killed from outside in the meantime. */
		if (rc && rc != -ESRCH)
			return rc;
	}
	return 0;
}

static int wait_root(uint32_t index)
{
	int status;

	handle_signals(SIG_DFL);
	if (restorer.plan.control_fd >= 0)
		close(restorer.plan.control_fd);
	while (waitpid(restorer.threads[index].tid, &status, 0) < 0)
		if (errno != EINTR)
			return 1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int execute(const struct lp_op *op, const void *body)
{
	const char *text = body;
	uint32_t index = op->thread;

	switch (op->kind) {
	case LP_OPEN:
		return do_open(body, text + sizeof(struct lp_open));
	case LP_PIPE:
		return do_pipe(body, text + sizeof(struct lp_pipe), op->body_size - sizeof(struct lp_pipe));
	case LP_REOPEN:
		return do_reopen(body);
	case LP_SHARED:
		return do_shared(body);
	case LP_CLOSE:
		close_slot(((const struct lp_close *)body)->slot);
		return 0;
	case LP_WRITE: {
		const struct lp_write *write_ = body;
		size_t head = sizeof(*write_) + write_->path_size;

		return do_write(write_, text + sizeof(*write_), text + head, op->body_size - head);
	}
	case LP_SPAWN:
		return lp_spawn(&restorer, index, body);
	case LP_CALL:
		return lp_do_call(&restorer, index, body, text + sizeof(struct lp_call_body),
				  op->body_size - sizeof(struct lp_call_body));
	case LP_GIVE:
		return lp_do_give(&restorer, index, body);
	case LP_SWITCH:
		return lp_do_switch(&restorer, index, body, op->body_size / sizeof(struct lp_place));
	case LP_FILL:
		return lp_do_fill(&restorer, index, body);
	case LP_EXIT:
		return lp_do_exit(&restorer, index, ((const struct lp_exit *)body)->status);
	case LP_REAP:
		return lp_do_reap(&restorer, index, ((const struct lp_reap *)body)->helper);
	case LP_DRAIN:
		return lp_do_drain(&restorer, index);
	case LP_REGS:
		return lp_do_regs(&restorer, index, body, op->body_size);
	case LP_UFFD:
		return do_uffd(index, body);
	case LP_ANNOUNCE:
		return do_announce(body);
	case LP_FINISH:
		return do_finish();
	case LP_GO:
		return do_go();
	default:
		return -EINVAL;
	}
}

static const char *explain(int rc, char *buf, size_t size)
{
	if (interrupted)
		snprintf(buf, size, "ended by signal %d (%s)", interrupted, strsignal(interrupted));
	else if (rc == -EPROTO)
		snprintf(buf, size, "the result differs from the expected one");
	else
		snprintf(buf, size, "%s", strerror(-rc));
	return buf;
}

static size_t padded(uint32_t size)
{
	return ((size_t)size + 7) / 8 * 8;
}

static void name_thread(const struct lp_op *op, char *buf, size_t size)
{
	const char *body = (const char *)(op + 1) + padded(op->label_size);
	const struct lp_thread *thread;

	if (op->thread == LP_NONE) {
		snprintf(buf, size, "restorer");
		return;
	}
	thread = &restorer.threads[op->thread];
	if (thread->leader != op->thread && thread->tid)
		snprintf(buf, size, "task %d thread %d", restorer.threads[thread->leader].tid, thread->tid);
	else
		snprintf(buf, size, "task %d",
			 op->kind == LP_SPAWN ? ((const struct lp_spawn *)body)->tid : thread->tid);
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static int run(const char *plan)
{
	const char *place = plan + sizeof(struct lp_plan);
	int verbose_fd = restorer.plan.log_fd >= 0 ? restorer.plan.log_fd : STDERR_FILENO;
	double begin = seconds();
	char subject[64], reason[256];

	for (uint32_t i = 0; i < restorer.plan.nr_ops; i++) {
		const struct lp_op *op = (const void *)place;
		const char *label = place + sizeof(*op), *body;
		int rc;

		body = label + padded(op->label_size);
		place = body + padded(op->body_size);
		if (op->kind == LP_WAIT)
			return wait_root(op->thread);
		name_thread(op, subject, sizeof(subject));
		if (restorer.plan.verbose)
			log_line(verbose_fd, "(%.6f) %s: %s", seconds() - begin, subject, label);
		rc = interrupted ? -EINTR : execute(op, body);
		if (rc) {
			/* The name was made before the op, which may have ended the task. */
			report_error(subject, label, explain(rc, reason, sizeof(reason)));
			kill_all();
			return 1;
		}
	}
	return 0;
}

/* Unregisters glibc's rseq area: tasks would inherit the registration without the memory (linux/rseq.h). */
static int drop_rseq(void)
{
#ifdef RSEQ_SIG
	char *area = (char *)__builtin_thread_pointer() + __rseq_offset;

	if (__rseq_size && syscall(SYS_rseq, area, RSEQ_REGISTERED_SIZE, 1 /* unregister */, RSEQ_SIG))
		return -errno;
#endif
	return 0;
}

static int get_ready(const char *argument, const char **plan)
{
	int fd = atoi(argument), rc;
	struct rlimit files;
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	if ((size_t)st.st_size < sizeof(restorer.plan))
		return -EINVAL;
	*plan = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (*plan == MAP_FAILED)
		return -errno;
	close(fd);
	rc = lp_check_plan(*plan, st.st_size);
	if (rc)
		return rc;
	memcpy(&restorer.plan, *plan, sizeof(restorer.plan));
	restorer.threads = calloc(restorer.plan.nr_threads + 1, sizeof(*restorer.threads));
	restorer.slots = malloc((restorer.plan.nr_slots + 1) * sizeof(*restorer.slots));
	restorer.shared = calloc(restorer.plan.nr_slots + 1, sizeof(*restorer.shared));
	restorer.sizes = calloc(restorer.plan.nr_slots + 1, sizeof(*restorer.sizes));
	if (!restorer.threads || !restorer.slots || !restorer.shared || !restorer.sizes)
		return -ENOMEM;
	memset(restorer.slots, -1, (restorer.plan.nr_slots + 1) * sizeof(*restorer.slots));
	if (getrlimit(RLIMIT_NOFILE, &files))
		return -errno;
	files.rlim_cur = files.rlim_max; /* tasks get their own limits from the plan */
	if (setrlimit(RLIMIT_NOFILE, &files))
		return -errno;
	if (prctl(PR_SET_CHILD_SUBREAPER, 1)) /* see kill_all */
		return -errno;
	umask(0);
	/* Ignored signals are inherited even with CLONE_CLEAR_SIGHAND, and Python ignores some. */
	for (int signo = 1; signo < NSIG; signo++)
		signal(signo, SIG_DFL);
	return drop_rseq();
}

int main(int argc, char **argv)
{
	const char *plan = NULL;
	char reason[256];
	int rc;

	if (argc != 2) {
		report_error("restorer", "arguments", "expects the descriptor of a plan; run `lazypages restore`");
		return 1;
	}
	rc = get_ready(argv[1], &plan);
	if (rc) {
		report_error("restorer", "reading the plan", explain(rc, reason, sizeof(reason)));
		return 1;
	}
	handle_signals(on_signal);
	rc = lp_prepare(&restorer);
	if (!rc && restorer.plan.control_fd >= 0)
		rc = learn_features();
	if (rc) {
		report_error("restorer", "getting ready", explain(rc, reason, sizeof(reason)));
		return 1;
	}
	return run(plan);
}
