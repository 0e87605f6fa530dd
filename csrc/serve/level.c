#define _GNU_SOURCE
#include "level.h"

#include <fcntl.h>
#include <sys/mman.h>

#include "common/clock.h"
#include "common/page.h"
#include "common/pages_file.h"

#define COLD_NS (LP_NS / 1000)	 /* a prefetch that takes longer has waited for a disk */
#define AHEAD ((uint64_t)8 << 20) /* bytes that are then read ahead of it, so that the disk is busy while these are copied */

static uint64_t file_held(const struct lp_level *level, uint64_t offset, uint64_t nr_pages)
{
	return lp_pages_held(level->fd, offset, nr_pages);
}

static int64_t file_read(const struct lp_level *level, void *buffer, uint64_t offset, uint64_t nr_pages)
{
	return lp_pages_read(level->fd, buffer, offset, nr_pages);
}

static void file_around(const struct lp_level *level, uint64_t offset, uint64_t size)
{
	readahead(level->fd, (off64_t)(offset - offset % size), size);
}

static void file_prefetch(const struct lp_level *level, uint64_t offset, uint64_t size)
{
	uint64_t begun = lp_now_ns();

	/* Linux 5.14; before that it fails, and page faults read the file */
	madvise((char *)(uintptr_t)level->base + (offset & ~(LP_PAGE_SIZE - 1)), size, MADV_POPULATE_READ);
	if (lp_now_ns() - begun > COLD_NS)
		readahead(level->fd, (off64_t)(offset + size), AHEAD);
}

void lp_level_of_file(struct lp_level *level, const void *base, uint64_t size, int fd)
{
	*level = (struct lp_level){base, size, fd, file_held, file_read, file_around, file_prefetch};
}
