#define _GNU_SOURCE
#include "level.h"

#include <sys/mman.h>

#include "common/page.h"
#include "common/pages_file.h"

static uint64_t file_held(const struct lp_level *level, uint64_t offset, uint64_t nr_pages)
{
	return lp_pages_held(level->fd, offset, nr_pages);
}

static void file_prefetch(const struct lp_level *level, uint64_t offset, uint64_t size)
{
	/* Linux 5.14; before that it fails, and page faults read the file */
	madvise((char *)(uintptr_t)level->base + (offset & ~(LP_PAGE_SIZE - 1)), size, MADV_POPULATE_READ);
}

void lp_level_of_file(struct lp_level *level, const void *base, uint64_t size, int fd)
{
	*level = (struct lp_level){base, size, fd, file_held, file_prefetch};
}
