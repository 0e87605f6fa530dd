/*
 * A program that others look at, OUT MEGABYTES: fills its memory, writes "ready" to OUT, and then does what signals ask for,
 * each answered by a line in OUT.  SIGUSR1: registers a page of the memory with a userfaultfd of its own; the line is the errno.
 * SIGUSR2: forks a child that touches nothing and waits; the line is its pid.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MEMORY (1ul << 45) /* away from all else, with which it would become one mapping */

static void say(const char *out, int number)
{
	FILE *file = fopen(out, "ae");

	if (!file || fprintf(file, "%d\n", number) < 0 || fclose(file))
		_exit(1);
}

static int register_own(void *page)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {
		.range = {(unsigned long)page, 4096},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int error = 0, fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		error = errno;
	close(fd);
	return error;
}

int main(int argc, char **argv)
{
	size_t size = argc > 2 ? (size_t)atoi(argv[2]) << 20 : 0;
	char *memory = mmap((void *)MEMORY, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	sigset_t asked;

	sigemptyset(&asked);
	sigaddset(&asked, SIGUSR1);
	sigaddset(&asked, SIGUSR2);
	sigprocmask(SIG_BLOCK, &asked, NULL);
	if (argc < 3 || memory == MAP_FAILED)
		return 1;
	for (size_t at = 0; at < size; at += 8)
		*(size_t *)(memory + at) = at + 1;
	say(argv[1], 0);
	for (;;) {
		int signo = sigwaitinfo(&asked, NULL);

		if (signo == SIGUSR1) {
			say(argv[1], register_own(memory + size / 2));
		} else if (signo == SIGUSR2) {
			pid_t child = fork();

			if (!child)
				for (;;)
					pause();
			say(argv[1], child);
		}
	}
}
