/*
 * The task that faults. It measures the time of each first touch of its memory.
 *
 *   task restored OPTIONS    plays a restorer and its tasks: maps memory at a fixed address, hands a userfaultfd of it to
 *                            the daemon as `criu restore --lazy-pages` does (docs/criu.md, "Control socket"), touches
 *   task victim OPTIONS      fills its memory, waits to be checkpointed and restored, touches when the file --go exists
 *
 * Every touch is compared with the expected word; at the end, outside of the measured time, whole pages are compared.
 * A wrong byte is reported in the results, and the exit status is 1.
 *
 * Restored tasks have the pids 2, 3, ... in a PID namespace of their own, so that their images can be written before.
 * Process 1 there is the restorer.  It writes "touched" when all touches are made, and continues when it reads a byte.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PR_SET_VMA 0x53564d41
#define FIRST_PID 2
#define POLL_NS 1000000	  /* between two checks whether all memory is there, or whether --go exists */
#define RSS_SLACK 1024	  /* pages by which the kernel's count of resident pages may lag */
#define SCRIBBLE 511	  /* the word that a write changes */
#define SCRIBBLED 0x5ca1ab1eull

/* One first touch. `at` is CLOCK_MONOTONIC. */
struct touch {
	uint64_t at;
	uint32_t page, ns;
};

/* A thread that touches: actor i is thread `i % threads` of task `i / threads`. */
struct actor {
	uint64_t start, end;
	uint64_t faults; /* touches of missing pages: pages that UFFDIO_COPY has placed are mapped, and cause no fault */
	uint32_t turn, unused;
};

/* The results file: this, the actors, the touches.  lazypages/bench/task.py reads it. */
struct results {
	uint64_t clock_cost; /* ns, already subtracted from every touch */
	uint64_t connected, handed; /* connected to the daemon; all memory is registered */
	uint64_t finished;   /* "restore finished" was sent */
	uint64_t start, touched, pass, passed, present;
	uint64_t wrong; /* number of wrong pages; the first of them: */
	uint64_t wrong_page, wrong_word, wrong_value;
	_Atomic uint32_t sent, registered, go, done;
};

enum { SIZE_OF_HEADER = 4096 };

static struct {
	const char *work, *results, *order, *go;
	uint64_t base, pages, stride, tasks, threads, batch;
	long cpu;
	bool write, chase, turns, background, pass;
} option = {.stride = 1, .tasks = 1, .threads = 1, .batch = 10, .cpu = -1};

static struct results *results;
static struct actor *actors;
static struct touch *touches;
static const uint32_t *order;
static uint64_t nr_order, task; /* task: index of the task that this process is */

/* ---- synchronisation of processes ---- */

static void wait_until(_Atomic uint32_t *word, uint32_t value)
{
	uint32_t seen;

	while ((seen = atomic_load(word)) != value)
		syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void set_and_wake(_Atomic uint32_t *word, uint32_t value)
{
	atomic_store(word, value);
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void count_up(_Atomic uint32_t *word)
{
	atomic_fetch_add(word, 1);
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* ---- memory and its expected contents ---- */

static volatile uint64_t *page_at(uint64_t page)
{
	return (volatile uint64_t *)(option.base + page * PAGE);
}

static uint64_t expected(uint64_t page, uint64_t word)
{
	return page % option.stride ? 0 : word_of(task + 1, page, word);
}

static void wrong(uint64_t page, uint64_t word, uint64_t value)
{
	if (__atomic_fetch_add(&results->wrong, 1, __ATOMIC_SEQ_CST))
		return;
	results->wrong_page = page;
	results->wrong_word = word;
	results->wrong_value = value;
}

/* Word 0 is the link of the chase, which compares it. */
static void check_page(uint64_t page, bool written)
{
	for (uint64_t word = 1; word < WORDS; word++) {
		uint64_t value = page_at(page)[word];

		if (value != (written && word == SCRIBBLE ? SCRIBBLED : expected(page, word))) {
			wrong(page, word, value);
			return;
		}
	}
}

static void map_memory(void)
{
	void *at = mmap((void *)option.base, option.pages * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

	if (at != (void *)option.base)
		die("mmap at %#llx", (unsigned long long)option.base);
}

static uint64_t resident(int statm)
{
	char text[128];
	ssize_t n = pread(statm, text, sizeof(text) - 1, 0);

	if (n <= 0)
		die("/proc/self/statm");
	text[n] = 0;
	return strtoull(strchr(text, ' '), NULL, 10);
}

/* Wait until every page with data is there. mincore(2) is exact; counting resident pages is cheap. */
static void await_present(int statm, uint64_t resident_before)
{
	uint64_t data = (option.pages + option.stride - 1) / option.stride, page;
	unsigned char *map = malloc(option.pages);
	struct timespec pause = {.tv_nsec = POLL_NS};

	for (page = 0; page < option.pages; nanosleep(&pause, NULL)) {
		if (resident(statm) + RSS_SLACK < resident_before + data)
			continue;
		if (mincore((void *)option.base, option.pages * PAGE, map))
			die("mincore");
		while (page < option.pages && (page % option.stride || map[page] & 1))
			page++;
		if (page >= option.pages)
			break;
	}
	free(map);
}

/* ---- touching ---- */

static uint64_t clock_cost(void)
{
	uint64_t least = UINT64_MAX;

	for (int i = 0; i < 1000; i++) {
		uint64_t start = now_ns(), ns = now_ns() - start;

		least = ns < least ? ns : least;
	}
	return least;
}

static uint64_t touch(uint64_t page, uint64_t i, uint64_t cost)
{
	/* any word of the page; the chase reads the link */
	uint64_t word = option.chase ? 0 : option.write ? SCRIBBLE : 2 + page % (WORDS - 2), start, ns, value;
	volatile uint64_t *at = page_at(page) + word;

	start = now_ns();
	if (option.write) {
		*at = SCRIBBLED;
		value = 0;
	} else {
		value = *at;
	}
	ns = now_ns() - start;
	ns = ns > cost ? ns - cost : 0;
	touches[i] = (struct touch){start, (uint32_t)page, ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX};
	if (!option.write && !option.chase && value != expected(page, word))
		wrong(page, word, value);
	return value;
}

static void *act(void *arg)
{
	uint64_t me = (uint64_t)(uintptr_t)arg, all = option.tasks * option.threads;
	/* all tasks use the same order; the threads of one task divide it */
	uint64_t first = me % option.threads * nr_order / option.threads;
	uint64_t end = (me % option.threads + 1) * nr_order / option.threads;
	uint64_t longest = nr_order / option.threads + 1;
	uint64_t into = me / option.threads * nr_order, cost = results->clock_cost, page = order[first];
	struct actor *actor = &actors[me];
	struct rusage before, after;

	getrusage(RUSAGE_THREAD, &before);
	actor->start = now_ns();
	for (uint64_t i = first; i < first + longest; i++) {
		if (option.turns && (i - first) % option.batch == 0)
			wait_until((_Atomic uint32_t *)&actor->turn, 1);
		if (i < end) {
			uint64_t value = touch(page, into + i, cost);

			if (i + 1 < nr_order) {
				if (option.chase && value != order[i + 1]) {
					wrong(page, 0, value);
					value = order[i + 1];
				}
				page = option.chase ? value : order[i + 1];
			}
		}
		if (option.turns && ((i - first) % option.batch == option.batch - 1 || i + 1 == first + longest)) {
			actor->turn = 0;
			set_and_wake((_Atomic uint32_t *)&actors[(me + 1) % all].turn, 1);
		}
	}
	actor->end = now_ns();
	getrusage(RUSAGE_THREAD, &after);
	actor->faults = (uint64_t)(after.ru_minflt - before.ru_minflt + after.ru_majflt - before.ru_majflt);
	return NULL;
}

static void run_actors(void)
{
	pthread_t *threads = calloc(option.threads, sizeof(*threads));

	for (uint64_t i = 1; i < option.threads; i++)
		if ((errno = pthread_create(&threads[i], NULL, act, (void *)(uintptr_t)(task * option.threads + i))))
			die("pthread_create");
	act((void *)(uintptr_t)(task * option.threads));
	for (uint64_t i = 1; i < option.threads; i++)
		pthread_join(threads[i], NULL);
	free(threads);
}

static void full_pass(void)
{
	uint64_t sum = 0;

	results->pass = now_ns();
	for (uint64_t page = 0; page < option.pages; page++)
		sum += *page_at(page);
	results->passed = now_ns();
	*(volatile uint64_t *)&sum;
}

static void check_memory(bool all)
{
	uint8_t *written = calloc(option.pages, 1);

	for (uint64_t i = 0; i < nr_order; i++) {
		written[order[i]] = option.write;
		if (!all)
			check_page(order[i], option.write);
	}
	for (uint64_t page = 0; all && page < option.pages; page++)
		check_page(page, written[page]);
	free(written);
}

/* ---- the restorer and its tasks ---- */

static void open_plan(void)
{
	struct stat status;
	int fd = open(option.order, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &status))
		die("%s", option.order);
	nr_order = (uint64_t)status.st_size / sizeof(*order);
	order = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (!nr_order || order == MAP_FAILED)
		die("%s", option.order);
	close(fd);
	fd = open(option.results, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die("%s", option.results);
	size_t size = SIZE_OF_HEADER + option.tasks * option.threads * sizeof(struct actor) +
		      option.tasks * nr_order * sizeof(struct touch);
	if (ftruncate(fd, (off_t)size))
		die("%s", option.results);
	results = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (results == MAP_FAILED)
		die("%s", option.results);
	close(fd);
	actors = (struct actor *)((char *)results + SIZE_OF_HEADER);
	touches = (struct touch *)(actors + option.tasks * option.threads);
	results->clock_cost = clock_cost();
}

static int open_uffd(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
			    UFFD_FEATURE_EVENT_UNMAP,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		die("userfaultfd");
	return fd;
}

static void send_uffd(int socket, int uffd)
{
	int32_t pid = getpid();
	char byte = 0;
	struct iovec part = {&byte, 1};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.space)};

	memcpy(CMSG_DATA(&control.header), &uffd, sizeof(uffd));
	if (send(socket, &pid, sizeof(pid), MSG_NOSIGNAL) != sizeof(pid) || sendmsg(socket, &message, MSG_NOSIGNAL) != 1)
		die("cannot send the uffd to the daemon");
}

static void follow_cpu(void)
{
	cpu_set_t set;

	if (option.cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET((size_t)option.cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static _Noreturn void be_task(int socket)
{
	struct uffdio_register range = {.range = {option.base, option.pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd, statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
	uint64_t resident_before;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	follow_cpu();
	map_memory();
	resident_before = resident(statm);
	uffd = open_uffd();
	send_uffd(socket, uffd);
	close(socket);
	count_up(&results->sent);
	if (ioctl(uffd, UFFDIO_REGISTER, &range))
		die("UFFDIO_REGISTER");
	close(uffd);
	count_up(&results->registered);
	wait_until(&results->go, 1);
	run_actors();
	count_up(&results->done);
	wait_until(&results->go, 2);
	if (option.pass)
		full_pass();
	if (option.background) {
		await_present(statm, resident_before);
		results->present = now_ns();
	}
	check_memory(option.background);
	_exit(0);
}

static void finish(int socket)
{
	uint32_t word = FINISH;

	if (send(socket, &word, sizeof(word), MSG_NOSIGNAL) != sizeof(word))
		die("cannot send the end of the restore to the daemon");
	results->finished = now_ns();
}

static int be_restorer(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = SOCKET};
	int control = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), status, failed = 0;
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (control < 0 || chdir(option.work) || connect(control, (struct sockaddr *)&name, sizeof(name)))
		die("%s/%s", option.work, SOCKET);
	results->connected = now_ns();
	for (task = 0; task < option.tasks; task++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (!pid)
			be_task(control);
		if (pid != (pid_t)(FIRST_PID + task))
			die("unexpected pid %d of a task", pid);
		wait_until(&results->sent, (uint32_t)task + 1);
	}
	wait_until(&results->registered, (uint32_t)option.tasks);
	results->handed = now_ns();
	if (option.background)
		finish(control);
	results->start = now_ns();
	actors[0].turn = 1;
	set_and_wake(&results->go, 1);
	wait_until(&results->done, (uint32_t)option.tasks);
	results->touched = now_ns();
	if (write(STDOUT_FILENO, "touched\n", 8) != 8 || read(STDIN_FILENO, &byte, 1) != 1)
		die("the bench has closed the pipe");
	set_and_wake(&results->go, 2);
	for (uint64_t i = 0; i < option.tasks; i++)
		if (wait(&status) < 0 || status)
			failed = 1;
	if (!option.background)
		finish(control); /* all tasks have ended */
	return failed;
}

static int restored(void)
{
	pid_t pid;
	int status;

	open_plan();
	if (unshare(CLONE_NEWPID))
		die("cannot create a PID namespace");
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid)
		_exit(be_restorer());
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	return status || results->wrong;
}

/* ---- the victim of a real checkpoint ---- */

static int victim(void)
{
	struct timespec pause = {.tv_nsec = POLL_NS};

	map_memory();
	for (uint64_t page = 0; page < option.pages; page++)
		for (uint64_t word = 0; word < WORDS; word++)
			page_at(page)[word] = word_of(task + 1, page, word);
	if (close(open(option.results, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)))
		die("%s", option.results);
	while (access(option.go, F_OK))
		nanosleep(&pause, NULL);
	open_plan();
	results->start = now_ns();
	run_actors();
	results->touched = now_ns();
	if (option.pass)
		full_pass();
	check_memory(true);
	return results->wrong != 0;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{"work", required_argument, NULL, 'w'},  {"results", required_argument, NULL, 'r'},
		{"order", required_argument, NULL, 'o'},   {"go", required_argument, NULL, 'g'},
		{"base", required_argument, NULL, 'b'},	   {"pages", required_argument, NULL, 'p'},
		{"stride", required_argument, NULL, 'd'},  {"tasks", required_argument, NULL, 't'},
		{"threads", required_argument, NULL, 'h'}, {"batch", required_argument, NULL, 'n'},
		{"cpu", required_argument, NULL, 'c'},	   {"write", no_argument, NULL, 'W'},
		{"chase", no_argument, NULL, 'C'},	   {"turns", no_argument, NULL, 'T'},
		{"background", no_argument, NULL, 'B'},	   {"pass", no_argument, NULL, 'P'},
		{NULL, 0, NULL, 0},
	};
	int letter;

	while ((letter = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (letter) {
		case 'w': option.work = optarg; break;
		case 'r': option.results = optarg; break;
		case 'o': option.order = optarg; break;
		case 'g': option.go = optarg; break;
		case 'b': option.base = number(optarg); break;
		case 'p': option.pages = number(optarg); break;
		case 'd': option.stride = number(optarg); break;
		case 't': option.tasks = number(optarg); break;
		case 'h': option.threads = number(optarg); break;
		case 'n': option.batch = number(optarg); break;
		case 'c': option.cpu = (long)number(optarg); break;
		case 'W': option.write = true; break;
		case 'C': option.chase = true; break;
		case 'T': option.turns = true; break;
		case 'B': option.background = true; break;
		case 'P': option.pass = true; break;
		default: return 2;
		}
	}
	errno = 0;
	if (optind + 1 == argc && !strcmp(argv[optind], "restored"))
		return restored();
	if (optind + 1 == argc && !strcmp(argv[optind], "victim"))
		return victim();
	die("usage: task OPTIONS restored|victim");
}
