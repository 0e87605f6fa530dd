/* Has the userfaultfd of a child, whose memory is registered for missing pages.  Prints the child's pid.
 * The child prints "signal" for each SIGUSR1.  With an argument, of the child
 * "leave"  the first thread has exited, and another one is left
 * "tick"   a timer of 1 ms sends SIGALRM; it prints "ticks N" after each 100 ms of the clock
 * "vfork"  the first thread waits in vfork(2), so that it can't stop, until its child gets a signal. */
#define _GNU_SOURCE
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#define PAGE 4096

static void on_signal(int signo)
{
	(void)signo;
	if (write(1, "signal\n", 7) != 7)
		_exit(1);
}

static volatile long ticks;

static void on_tick(int signo)
{
	(void)signo;
	ticks++;
}

static void tick(void)
{
	struct itimerval each = {{0, 1000}, {0, 1000}};
	struct timespec now, then;
	long before;

	signal(SIGALRM, on_tick);
	setitimer(ITIMER_REAL, &each, NULL);
	for (;;) {
		before = ticks;
		clock_gettime(CLOCK_MONOTONIC, &then);
		do {
			pause();
			clock_gettime(CLOCK_MONOTONIC, &now);
		} while ((now.tv_sec - then.tv_sec) * 1000000000 + now.tv_nsec - then.tv_nsec < 100000000);
		printf("ticks %ld\n", ticks - before);
		fflush(stdout);
	}
}

static void wait_in_vfork(void)
{
	if (!vfork()) {
		pause();
		_exit(0);
	}
}

static void *be_there(void *arg)
{
	for (;;)
		pause();
	return arg;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int to_child[2], to_parent[2], from_child;
	char byte;
	pid_t child;

	if (pipe(to_child) || pipe(to_parent))
		return 1;
	child = fork();
	if (!child) {
		struct uffdio_api api = {.api = UFFD_API};
		struct uffdio_register range = {.range = {.len = PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
		int uffd = syscall(SYS_userfaultfd, 0);
		void *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		range.range.start = (unsigned long)memory;
		if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
			return 1;
		signal(SIGUSR1, on_signal);
		if (write(to_parent[1], &uffd, sizeof(uffd)) != sizeof(uffd))
			return 1;
		if (read(to_child[0], &byte, 1) != 1)
			return 1;
		close(uffd);
		printf("%d\n", getpid());
		fflush(stdout);
		if (argc > 1 && !strcmp(argv[1], "tick"))
			tick();
		if (argc > 1 && !strcmp(argv[1], "vfork")) {
			wait_in_vfork();
			be_there(NULL);
		}
		if (argc > 1 && pthread_create(&thread, NULL, be_there, argv))
			return 1;
		if (argc > 1)
			syscall(SYS_exit, 0);
		be_there(NULL);
	}
	if (read(to_parent[0], &from_child, sizeof(from_child)) != sizeof(from_child))
		return 1;
	if (syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, child, 0), from_child, 0) < 0)
		return 1;
	if (write(to_child[1], ".", 1) != 1)
		return 1;
	be_there(NULL);
}
