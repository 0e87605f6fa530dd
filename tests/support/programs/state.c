/*
 * A task with something of everything that images hold about it: `state`. Sets it up, prints "ready"; on SIGUSR2 it looks
 * whether all is still so and says what is not.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition) do { if (!(condition)) { printf("not so: %s (errno %d)\n", #condition, errno); wrong = 1; } } while (0)

static int wrong, taken[65], values[65], pipe_fds[2], file, twin, readers[2];
static char alternate[65536];
static timer_t timer;
static volatile int parked;

static void handler(int signo, siginfo_t *info, void *context)
{
	(void)context;
	taken[signo]++;
	values[signo] = info->si_value.sival_int;
}

static void on_alternate(int signo)
{
	char here;

	(void)signo;
	taken[SIGHUP] = &here >= alternate && &here < alternate + sizeof(alternate);
}

/* Threads that sleep in system calls of every restarting kind, over the dump: what each had to say in the end, NULL if nothing. */
static char *told(const char *call, long result)
{
	char *text;

	if (asprintf(&text, "%s: result %ld, errno %d, SIGWINCH taken %d times", call, result, errno, taken[SIGWINCH]) < 0)
		abort();
	return text;
}

static void *reads(void *unused)
{
	char byte = 0;
	long result;

	(void)unused;
	__atomic_add_fetch(&parked, 1, __ATOMIC_SEQ_CST);
	result = read(readers[0], &byte, 1);
	return result == 1 && byte == 'r' ? NULL : told("read", result);
}

static int futex_word = 1;
static void *futex_waits(void *unused)
{
	(void)unused;
	__atomic_add_fetch(&parked, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&futex_word, __ATOMIC_SEQ_CST) == 1) {
		struct timespec until;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += 1000;
		if (syscall(SYS_futex, &futex_word, FUTEX_WAIT_BITSET, 1, &until, NULL, FUTEX_BITSET_MATCH_ANY) &&
		    errno != EAGAIN)
			return told("futex", -1); /* EINTR would come here */
	}
	return NULL;
}

static void *suspends(void *unused)
{
	sigset_t none;
	long result;

	(void)unused;
	sigfillset(&none);
	sigdelset(&none, SIGWINCH);
	__atomic_add_fetch(&parked, 1, __ATOMIC_SEQ_CST);
	result = sigsuspend(&none);
	return result == -1 && errno == EINTR && taken[SIGWINCH] == 1 ? NULL : told("sigsuspend", result);
}

static void *polls(void *unused)
{
	struct timespec until = { .tv_sec = 1000 };
	struct pollfd one = { .fd = readers[0], .events = POLLHUP };
	long result;

	(void)unused;
	__atomic_add_fetch(&parked, 1, __ATOMIC_SEQ_CST);
	result = ppoll(&one, 1, &until, NULL);
	return result == 1 ? NULL : told("ppoll", result);
}

/* Whether all other threads of this process sleep, in the calls that they are to be found in. */
static int others_sleep(void)
{
	DIR *folder = opendir("/proc/self/task");
	struct dirent *entry;
	int sleep = 1;

	while ((entry = readdir(folder))) {
		char path[300], line[512] = "", *end;
		FILE *file;

		if (entry->d_name[0] == '.' || atoi(entry->d_name) == gettid())
			continue;
		snprintf(path, sizeof(path), "/proc/self/task/%s/stat", entry->d_name);
		file = fopen(path, "r");
		if (file && fgets(line, sizeof(line), file)) {
			end = strrchr(line, ')');
			sleep &= end && end[2] == 'S';
		}
		if (file)
			fclose(file);
	}
	closedir(folder);
	return sleep;
}

static void set_up(pthread_t threads[4])
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct itimerval real = { { 500, 0 }, { 1000, 0 } }, virt = { { 0, 5 }, { 2000, 0 } };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 99 };
	struct itimerspec spec = { { 7, 0 }, { 3000, 0 } };
	stack_t stack = { .ss_sp = alternate, .ss_size = sizeof(alternate) };
	struct rlimit limit = { 77, 100 };
	struct sched_param parameters = { 0 };
	union sigval value = { .sival_int = 4242 };
	sigset_t set;

	umask(027);
	if (mkdir("sub", 0700) || chdir("sub"))
		abort();
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGWINCH, &action, NULL);
	sigaddset(&action.sa_mask, SIGPROF);
	sigaction(SIGRTMIN + 1, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
	sigaltstack(&stack, NULL);
	action.sa_handler = on_alternate;
	action.sa_flags = SA_ONSTACK;
	sigaction(SIGHUP, &action, NULL);
	setitimer(ITIMER_REAL, &real, NULL);
	setitimer(ITIMER_VIRTUAL, &virt, NULL);
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	timer_settime(timer, 0, &spec, NULL);
	setrlimit(RLIMIT_NOFILE, &limit);
	prctl(PR_SET_NAME, "odd \xff)name", 0, 0, 0);
	/*
	 * One that is ignored, for it comes when the restorer, our parent, ends: a handler would disturb the sleep of whichever
	 * thread it runs in.
	 */
	prctl(PR_SET_PDEATHSIG, SIGPIPE, 0, 0, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	setpriority(PRIO_PROCESS, 0, 5);
	sched_setscheduler(0, SCHED_BATCH, &parameters);

	file = open("file", O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
	if (write(file, "0123456789", 10) != 10 || lseek(file, 4, SEEK_SET) != 4)
		abort();
	twin = dup(file);
	if (pipe2(pipe_fds, O_NONBLOCK) || write(pipe_fds[1], "in the pipe", 11) != 11 || pipe(readers))
		abort();

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigaddset(&set, SIGRTMIN + 2);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	pthread_create(&threads[0], NULL, reads, NULL);
	pthread_create(&threads[1], NULL, futex_waits, NULL);
	pthread_create(&threads[2], NULL, suspends, NULL);
	pthread_create(&threads[3], NULL, polls, NULL);
	while (__atomic_load_n(&parked, __ATOMIC_SEQ_CST) < 4 || !others_sleep())
		usleep(1000);

	sigqueue(getpid(), SIGRTMIN + 1, value); /* pending for the process, twice */
	value.sival_int++;
	sigqueue(getpid(), SIGRTMIN + 1, value);
	syscall(SYS_tgkill, getpid(), gettid(), SIGRTMIN + 2); /* pending for the thread */
}

static int in_order(struct timeval *left, long at_most, long at_least)
{
	return left->tv_sec < at_most && left->tv_sec >= at_least;
}

static void check(pthread_t threads[4], pid_t pid, struct robust_list_head *robust_before)
{
	struct sigaction action;
	struct itimerval left;
	struct itimerspec spec;
	stack_t stack;
	struct rlimit limit;
	struct robust_list_head *head;
	char text[32], comm[16];
	size_t size;
	int number;
	sigset_t set, pending;

	CHECK(getpid() == pid && gettid() == pid && getsid(0) == pid && getpgrp() == pid);
	CHECK(umask(0) == 027);
	CHECK(access("file", F_OK) == 0);
	CHECK(sigaction(SIGRTMIN + 1, NULL, &action) == 0 && action.sa_sigaction == handler);
	CHECK(action.sa_flags & SA_SIGINFO && action.sa_flags & SA_RESTART && sigismember(&action.sa_mask, SIGPROF) == 1);
	CHECK(sigaction(SIGPIPE, NULL, &action) == 0 && action.sa_handler == SIG_IGN);
	CHECK(sigaltstack(NULL, &stack) == 0 && stack.ss_sp == alternate && stack.ss_size == sizeof(alternate));
	raise(SIGHUP);
	CHECK(taken[SIGHUP] == 1);
	CHECK(getitimer(ITIMER_REAL, &left) == 0 && left.it_interval.tv_sec == 500 && in_order(&left.it_value, 1000, 800));
	CHECK(getitimer(ITIMER_VIRTUAL, &left) == 0 && left.it_interval.tv_usec >= 5 && in_order(&left.it_value, 2001, 1990));
	CHECK(timer_gettime(timer, &spec) == 0 && spec.it_interval.tv_sec == 7 && spec.it_value.tv_sec > 2800);
	CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur == 77 && limit.rlim_max == 100);
	CHECK(prctl(PR_GET_NAME, comm) == 0 && strcmp(comm, "odd \xff)name") == 0);
	CHECK(prctl(PR_GET_PDEATHSIG, &number) == 0 && number == SIGPIPE);
	CHECK(prctl(PR_GET_CHILD_SUBREAPER, &number) == 0 && number == 1);
	CHECK(getpriority(PRIO_PROCESS, 0) == 5 && sched_getscheduler(0) == SCHED_BATCH);
	CHECK(syscall(SYS_get_robust_list, 0, &head, &size) == 0 && head == robust_before && size == 24);

	CHECK(lseek(file, 0, SEEK_CUR) == 4 && lseek(twin, 2, SEEK_CUR) == 6 && lseek(file, 0, SEEK_CUR) == 6);
	CHECK(fcntl(file, F_GETFL) == (O_RDWR | O_APPEND | O_LARGEFILE) || fcntl(file, F_GETFL) == (O_RDWR | O_APPEND | 0100000));
	CHECK(fcntl(file, F_GETFD) == FD_CLOEXEC && fcntl(twin, F_GETFD) == 0);
	CHECK(read(file, text, 4) == 4 && memcmp(text, "6789", 4) == 0);
	CHECK(read(pipe_fds[0], text, sizeof(text)) == 11 && memcmp(text, "in the pipe", 11) == 0);
	CHECK(read(pipe_fds[0], text, 1) == -1 && errno == EAGAIN);

	CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGRTMIN + 1) && sigismember(&pending, SIGRTMIN + 2));
	CHECK(sigprocmask(SIG_BLOCK, NULL, &set) == 0 && sigismember(&set, SIGRTMIN + 2) && !sigismember(&set, SIGUSR1));
	signal(SIGRTMIN + 2, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	CHECK(taken[SIGRTMIN + 1] == 2 && values[SIGRTMIN + 1] == 4243);

	/* Let the sleepers go on. */
	__atomic_store_n(&futex_word, 2, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1);
	pthread_kill(threads[2], SIGWINCH);
	CHECK(write(readers[1], "r", 1) == 1);
	for (int i = 0; i < 4; i++) {
		void *wrong_with_it = NULL;

		if (i == 3)
			close(readers[1]);
		CHECK(pthread_join(threads[i], &wrong_with_it) == 0);
		if (wrong_with_it) {
			printf("thread %d was disturbed: %s\n", i, (char *)wrong_with_it);
			wrong = 1;
		}
	}
}

int main(void)
{
	pthread_t threads[4];
	struct robust_list_head *robust_before;
	size_t size;
	sigset_t set;
	int signo;

	set_up(threads);
	syscall(SYS_get_robust_list, 0, &robust_before, &size);
	printf("ready\n");
	fflush(stdout);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	while (sigwait(&set, &signo))
		;
	check(threads, getpid(), robust_before);
	printf(wrong ? "wrong\n" : "all as before\n");
	return 0;
}
