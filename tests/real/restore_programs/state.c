/*
 * state DIRECTORY [leaderless]: a tree of tasks, each with as much of its own state as there is, that then waits for
 * ever.  DIRECTORY/ready appears when all is set up.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <signal.h>
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
#include <unistd.h>

#define CHECK(expression)                           \
	do {                                        \
		if ((expression) < 0) {             \
			perror(#expression);        \
			_exit(3);                   \
		}                                   \
	} while (0)

static char stack[65536];
static volatile int thread_ready;
static int said[2]; /* a pipe, until all is set up */

static void handler(int signo)
{
	(void)signo;
}

static void *thread(void *unused)
{
	stack_t other = { .ss_sp = stack + 32768, .ss_size = 32768 };
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	sigaddset(&mask, SIGRTMIN + 5);
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	prctl(PR_SET_NAME, "second \xc3\xa4");
	CHECK(sigaltstack(&other, NULL));
	CHECK(setpriority(PRIO_PROCESS, 0, 5));
	syscall(SYS_tgkill, getpid(), gettid(), SIGUSR2);
	thread_ready = 1;
	for (;;)
		pause();
	return unused;
}

static void sleep_for_ever(void)
{
	for (;;)
		pause();
}

/* A process in a group whose leader is gone. */
static void leave_a_group(void)
{
	int group[2];
	char byte;

	CHECK(pipe(group));
	pid_t leader = fork();
	if (!leader) {
		CHECK(setpgid(0, 0));
		_exit(0);
	}
	siginfo_t info;
	CHECK(waitid(P_PID, leader, &info, WEXITED | WNOWAIT));
	pid_t left = fork();
	if (!left) {
		CHECK(setpgid(0, leader));
		CHECK(write(group[1], "", 1));
		close(group[1]);
		close(said[0]);
		close(said[1]);
		sleep_for_ever();
	}
	CHECK(read(group[0], &byte, 1));
	CHECK(waitpid(leader, NULL, 0));
}

/* With fewer rights, in a session of its own. */
static void fewer_rights(bool leaderless)
{
	gid_t groups[] = { 4711, 12 };

	CHECK(setsid());
	if (leaderless)
		leave_a_group();
	CHECK(setgroups(2, groups));
	CHECK(prctl(PR_SET_KEEPCAPS, 1));
	CHECK(prctl(PR_CAPBSET_DROP, 25 /* CAP_SYS_TIME */));
	CHECK(prctl(PR_SET_SECUREBITS, 1 << 2 /* SECBIT_NO_SETUID_FIXUP */));
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct sets[2] = { { 0xff, 0xfff, 0xf }, { 0 } };
	CHECK(syscall(SYS_capset, &head, sets));
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 2, 0, 0));
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR1));
	CHECK(write(said[1], "", 1));
	close(said[0]);
	close(said[1]);
	sleep_for_ever();
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART | SA_ONSTACK };
	struct itimerval timer = { { 3000, 0 }, { 5000, 0 } };
	struct rlimit files = { 500, 1000 };
	stack_t alternate = { .ss_sp = stack, .ss_size = 32768 };
	union sigval value = { .sival_int = 4711 };
	sigset_t mask;
	int fd, ends[2];
	bool leaderless = argc > 2;
	pthread_t other;

	if (argc < 2 || chdir(argv[1]))
		return 1;
	/* Files. */
	CHECK(fd = open("file", O_RDWR | O_CREAT | O_CLOEXEC, 0640));
	CHECK(write(fd, "0123456789", 10));
	CHECK(lseek(fd, 4, SEEK_SET));
	CHECK(dup2(fd, 77));
	CHECK(open("file", O_RDONLY | O_NOATIME));
	CHECK(open("/dev/zero", O_RDWR | O_NONBLOCK));
	CHECK(pipe2(ends, O_NONBLOCK));
	CHECK(fcntl(ends[1], F_SETPIPE_SZ, 16384));
	CHECK(write(ends[1], "in the pipe", 11));
	CHECK(dup2(ends[1], 300));
	CHECK(open(".", O_RDONLY | O_DIRECTORY));
	/* Children: one that ended, one that was killed, one that is stopped, one with fewer rights. */
	pid_t dead = fork();
	if (!dead)
		_exit(5);
	pid_t killed = fork();
	if (!killed) {
		CHECK(setpgid(0, 0));
		sleep_for_ever();
	}
	pid_t stopped = fork();
	if (!stopped)
		sleep_for_ever();
	kill(stopped, SIGSTOP);
	kill(killed, SIGTERM);
	siginfo_t info;
	CHECK(waitid(P_PID, stopped, &info, WSTOPPED));
	CHECK(waitid(P_PID, dead, &info, WEXITED | WNOWAIT));
	CHECK(waitid(P_PID, killed, &info, WEXITED | WNOWAIT));
	char byte;
	CHECK(pipe(said));
	pid_t fewer = fork();
	if (!fewer)
		fewer_rights(leaderless);
	CHECK(read(said[0], &byte, 1));
	close(said[0]);
	close(said[1]);
	/* Memory. */
	void *at = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(at, 1, 1 << 20);
	CHECK(mprotect((char *)at + 8192, 8192, PROT_NONE));
	CHECK(mprotect((char *)at + 65536, 8192, PROT_READ));
	CHECK(madvise((char *)at + 131072, 65536, MADV_DONTDUMP));
	at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
	memcpy((char *)at + 2, "ab", 2);
	/* The task. */
	CHECK(sigaction(SIGUSR1, &action, NULL));
	action.sa_handler = SIG_IGN;
	CHECK(sigaction(SIGPIPE, &action, NULL));
	action.sa_handler = handler;
	sigfillset(&action.sa_mask);
	CHECK(sigaction(SIGRTMAX, &action, NULL));
	sigemptyset(&mask);
	sigaddset(&mask, SIGHUP);
	sigaddset(&mask, SIGRTMIN + 1);
	CHECK(sigprocmask(SIG_SETMASK, &mask, NULL));
	kill(getpid(), SIGHUP);
	CHECK(sigqueue(getpid(), SIGRTMIN + 1, value));
	CHECK(sigqueue(getpid(), SIGRTMIN + 1, value));
	CHECK(sigaltstack(&alternate, NULL));
	CHECK(setitimer(ITIMER_REAL, &timer, NULL));
	CHECK(setitimer(ITIMER_PROF, &timer, NULL));
	CHECK(setrlimit(RLIMIT_NOFILE, &files));
	umask(0137);
	prctl(PR_SET_NAME, ") name (");
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1));
	CHECK(nice(3));
	if (pthread_create(&other, NULL, thread, NULL))
		return 1;
	while (!thread_ready)
		usleep(1000);
	CHECK(open("ready", O_CREAT | O_WRONLY, 0644));
	sleep_for_ever();
}
