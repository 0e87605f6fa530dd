/*
 * A run of pages of one task, and the location of their data.
 *
 * Placement (images_spec/placement.md) makes a sorted array of extents from a pagemap and those of its parents.  The daemon
 * builds a task's address space from it.
 */
#ifndef LAZYPAGES_EXTENT_H
#define LAZYPAGES_EXTENT_H

#include <stdint.h>

/* Values of lp_extent.source that are not levels of the chain. */
#define LP_SOURCE_REMOTE 0xfffffffeu /* LAZY pages whose data a page server has */
#define LP_SOURCE_LOST 0xffffffffu   /* pages of a pagemap whose data no level has */

struct lp_extent {
	uint64_t start;    /* address at dump time, page aligned */
	uint64_t nr_pages; /* > 0 */
	uint64_t offset;   /* of the first page in the level's pages file, bytes */
	uint32_t source;   /* level that has the data (0: own image, 1: parent, ...), or LP_SOURCE_* */
	uint32_t lazy;     /* 1: the daemon may serve the pages after the restore; 0: the restorer reads them */
};

/* The address after the last page. */
static inline uint64_t lp_extent_end(const struct lp_extent *extent)
{
	return extent->start + extent->nr_pages * 4096;
}

#endif
