#define _GNU_SOURCE
#include "old_length.h"

#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "common/page.h"
#include "uffd_ops.h"

#define PATIENCE_MS 1000 /* for a thread that does nothing but one mremap */

static bool reports_old_length = true;

/* Pages 0 and 1 are moved, shrunk to one, to page 2.  From then on 0 and 1 may belong to any other thread of this process. */
static void *shrink_and_move(void *at)
{
	return mremap(at, 2 * LP_PAGE_SIZE, LP_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)at + 2 * LP_PAGE_SIZE);
}

/* The length that is reported; 0: none is. */
static uint64_t reported_length(int uffd)
{
	struct pollfd readable = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg;

	while (poll(&readable, 1, PATIENCE_MS) == 1 && read(uffd, &msg, sizeof(msg)) == sizeof(msg))
		if (msg.event == UFFD_EVENT_REMAP)
			return msg.arg.remap.len;
	return 0;
}

static void find_out(void)
{
	int uffd = lp_uffd_open(UFFD_FEATURE_EVENT_REMAP);
	char *at = mmap(NULL, 3 * LP_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;
	void *moved;

	if (uffd < 0 || at == MAP_FAILED || !lp_uffd_register(uffd, at, 2) || pthread_create(&thread, NULL, shrink_and_move, at))
		goto out;
	reports_old_length = reported_length(uffd) != LP_PAGE_SIZE;
	/* ends the wait of a thread whose event has not been read */
	close(uffd);
	pthread_join(thread, &moved);
	if (moved != MAP_FAILED) /* else nobody knows which of the pages are still ours: they stay */
		munmap(moved, LP_PAGE_SIZE);
	return;
out:
	if (at != MAP_FAILED)
		munmap(at, 3 * LP_PAGE_SIZE);
	if (uffd >= 0)
		close(uffd);
}

bool lp_reports_old_length(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, find_out);
	return reports_old_length;
}
