/*
 * The probe of csrc/serve/old_length.c leaves a hole in this process, where another thread maps memory at once: that must stay.
 *
 * Its mmap and pthread_join are those below, so that the other thread always comes at that moment.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define PAGES_OF_THE_HOLE (2 * 4096)

static char *probe, *neighbour = MAP_FAILED;

static void *probe_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
	return probe = mmap(at, size, protection, flags, fd, offset);
}

static int probe_join(pthread_t thread, void **result)
{
	int rc = pthread_join(thread, result);

	neighbour = mmap(probe, PAGES_OF_THE_HOLE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (neighbour != MAP_FAILED)
		memset(neighbour, 'x', PAGES_OF_THE_HOLE);
	return rc;
}

#define mmap probe_mmap
#define pthread_join probe_join
#include "serve/old_length.c"

int main(void)
{
	bool old = lp_reports_old_length();
	unsigned char there[2];

	if (neighbour != probe) {
		perror("the probe has left no hole");
		return 1;
	}
	if (mincore(neighbour, PAGES_OF_THE_HOLE, there)) {
		perror("memory of another thread is gone");
		return 2;
	}
	printf("%s\n", old ? "old" : "new");
	return 0;
}
