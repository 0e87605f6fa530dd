/*
 * A task with memory that can't be read: some of its pages are poisoned (UFFDIO_POISON, Linux 6.6), which stays when the
 * userfaultfd is closed. Says where its pages are, and sleeps.
 *
 * poisoned PAGES STEP: every STEP-th page is.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

static void need(int good, const char *what)
{
	if (good)
		return;
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	size_t pages = strtoul(argv[argc - 2], NULL, 10), step = strtoul(argv[argc - 1], NULL, 10), size = pages * 4096;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {.range = {(unsigned long)memory, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};

	need(memory != MAP_FAILED && uffd >= 0, "memory");
	for (size_t i = 0; i < pages; i++)
		memset(memory + i * 4096, (int)(i % 255 + 1), 4096);
	need(!ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &range), "register");
	for (size_t i = 0; i < pages; i += step) {
		struct uffdio_poison poison = {.range = {(unsigned long)memory + i * 4096, 4096}};

		need(!madvise(memory + i * 4096, 4096, MADV_DONTNEED), "madvise");
		need(!ioctl(uffd, UFFDIO_POISON, &poison), "poison");
	}
	close(uffd);
	printf("%p\n", (void *)memory);
	fflush(stdout);
	for (;;)
		pause();
}
