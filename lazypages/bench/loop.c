/*
 * A minimal fault handler: the limit with which daemons are compared.
 *
 *   loop --work DIR --status-fd N --pages FILES --base B --size PAGES [--stride S] [--cpu C] [--bulk THREADS]
 *
 * It speaks the protocol of `criu lazy-pages` with the restorer, but does not read images: page p of task t is page
 * p / stride of the file FILES with the number t - 1 (tasks have the pids 2, 3, ...) if p is divisible by stride, else
 * zero.  One thread waits in epoll_wait, reads one message, copies one page.  After the end of the restore --bulk
 * threads copy everything in 256 KiB pieces.  Each works on 2 MiB at a time, which one page table maps; source pages are
 * mapped before the copies.
 *
 * It is not a daemon: tasks may only touch their memory, and events other than faults are errors.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define FIRST_PID 2
#define CHUNK (256ull << 10)
#define STRIPE (2ull << 20)
#define MAX_TASKS 65536

struct task {
	int uffd;
	char *data;
	uint64_t bytes;
	_Atomic uint64_t next; /* for --bulk */
};

static struct task *tasks;
static size_t nr_tasks;
static _Atomic size_t nr_drained;
static uint64_t base, size, stride = 1;
static const char *files;

static void copy_page(struct task *t, uint64_t address)
{
	uint64_t page = (address - base) / PAGE;
	struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)t->data + page / stride * PAGE, .len = PAGE};
	struct uffdio_zeropage zero = {.range = {address, PAGE}};

	if (page % stride ? ioctl(t->uffd, UFFDIO_ZEROPAGE, &zero) : ioctl(t->uffd, UFFDIO_COPY, &copy)) {
		if (errno == EEXIST)
			ioctl(t->uffd, UFFDIO_WAKE, &(struct uffdio_range){address, PAGE});
		else if (errno != ESRCH)
			die("cannot copy a page");
	}
}

static void serve(struct task *t)
{
	struct uffd_msg message;

	if (read(t->uffd, &message, sizeof(message)) != sizeof(message))
		return;
	if (message.event != UFFD_EVENT_PAGEFAULT)
		die("unexpected event %#x", message.event);
	copy_page(t, message.arg.pagefault.address & ~(PAGE - 1));
}

static void drain_stripe(struct task *t, uint64_t at, uint64_t end)
{
	/* With a stride a piece is one page, as for every peer. */
	uint64_t piece = stride == 1 ? CHUNK : PAGE;

	while (at < end) {
		struct uffdio_copy copy = {
			.dst = base + at * stride,
			.src = (uintptr_t)t->data + at,
			.len = piece < end - at ? piece : end - at,
		};

		if (!ioctl(t->uffd, UFFDIO_COPY, &copy))
			at += copy.len;
		else if (copy.copy > 0)
			at += (uint64_t)copy.copy;
		else if (errno == EEXIST)
			at += PAGE; /* a fault has placed it */
		else if (errno == ESRCH)
			return;
		else if (errno != EAGAIN)
			die("cannot copy pages");
	}
}

static void drain(struct task *t)
{
	uint64_t at;

	while ((at = atomic_fetch_add(&t->next, STRIPE)) < t->bytes) {
		uint64_t end = at + STRIPE < t->bytes ? at + STRIPE : t->bytes;

		madvise(t->data + at, end - at, MADV_POPULATE_READ);
		drain_stripe(t, at, end);
	}
}

static void *drain_all(void *arg)
{
	for (size_t i = 0; i < nr_tasks; i++)
		drain(&tasks[i]);
	atomic_fetch_add(&nr_drained, 1);
	return arg;
}

/* Receive a pid and its uffd.  False: the restore has finished. */
static bool receive(int control, int epfd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} buffer;
	struct msghdr message = {.msg_iovlen = 1, .msg_control = &buffer, .msg_controllen = sizeof(buffer)};
	struct epoll_event event = {.events = EPOLLIN};
	struct task *t;
	struct stat status;
	uint32_t pid;
	char path[4096], byte;
	struct iovec part = {&byte, 1};
	int fd;

	errno = 0;
	if (recv(control, &pid, sizeof(pid), MSG_WAITALL) != sizeof(pid))
		die("the restorer has closed the connection");
	if (pid == FINISH)
		return false;
	message.msg_iov = &part;
	if (recvmsg(control, &message, 0) != 1 || !CMSG_FIRSTHDR(&message) || nr_tasks == MAX_TASKS)
		die("the restorer sent no uffd");
	t = &tasks[nr_tasks++];
	memcpy(&t->uffd, CMSG_DATA(&buffer.header), sizeof(t->uffd));
	snprintf(path, sizeof(path), files, (int)(pid - FIRST_PID + 1));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status))
		die("%s", path);
	t->bytes = (uint64_t)status.st_size;
	t->data = mmap(NULL, t->bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (t->data == MAP_FAILED || t->bytes < (size + stride - 1) / stride * PAGE)
		die("%s", path);
	close(fd);
	event.data.ptr = t;
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, t->uffd, &event))
		die("epoll_ctl");
	return true;
}

static void use_cpu(long cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static int listen_in(const char *work)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = SOCKET};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || chdir(work) || bind(fd, (struct sockaddr *)&name, sizeof(name)) || listen(fd, 1))
		die("%s/%s", work, SOCKET);
	return fd;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{"work", required_argument, NULL, 'w'}, {"status-fd", required_argument, NULL, 'f'},
		{"pages", required_argument, NULL, 'p'},  {"base", required_argument, NULL, 'b'},
		{"size", required_argument, NULL, 'z'},	  {"stride", required_argument, NULL, 'd'},
		{"cpu", required_argument, NULL, 'c'},	  {"bulk", required_argument, NULL, 'B'},
		{NULL, 0, NULL, 0},
	};
	int letter, status_fd = -1, control, epfd = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event event = {.events = EPOLLIN}, ready;
	uint64_t bulk = 0;
	const char *work = NULL;

	while ((letter = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (letter) {
		case 'w': work = optarg; break;
		case 'f': status_fd = (int)number(optarg); break;
		case 'p': files = optarg; break;
		case 'b': base = number(optarg); break;
		case 'z': size = number(optarg); break;
		case 'd': stride = number(optarg); break;
		case 'c': use_cpu((long)number(optarg)); break;
		case 'B': bulk = number(optarg); break;
		default: return 2;
		}
	}
	tasks = calloc(MAX_TASKS, sizeof(*tasks));
	if (!work || !files || !base || !size || !stride || !tasks)
		die("usage: loop --work DIR --status-fd N --pages FILES --base B --size PAGES [...]");
	control = listen_in(work);
	if (status_fd >= 0 && (write(status_fd, "", 1) != 1 || close(status_fd)))
		die("--status-fd");
	control = accept4(control, NULL, NULL, SOCK_CLOEXEC);
	if (control < 0 || epoll_ctl(epfd, EPOLL_CTL_ADD, control, &event))
		die("accept");
	for (bool finished = false; !finished || atomic_load(&nr_drained) < bulk;) {
		/* while threads copy, check from time to time whether they are done */
		if (epoll_wait(epfd, &ready, 1, finished ? 1 : -1) != 1)
			continue;
		if (ready.data.ptr) {
			serve(ready.data.ptr);
		} else if (!receive(control, epfd)) {
			finished = true;
			epoll_ctl(epfd, EPOLL_CTL_DEL, control, NULL);
			for (uint64_t i = 0; i < bulk; i++) {
				pthread_t thread;

				if ((errno = pthread_create(&thread, NULL, drain_all, NULL)))
					die("pthread_create");
				pthread_detach(thread);
			}
		}
	}
	return 0;
}
