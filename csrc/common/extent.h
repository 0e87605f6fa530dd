/*
 * A run of pages of one task and the place of their data.
 *
 * Placement (images_spec/placement.md) makes a sorted array of these from a pagemap and those of its parents; the
 * daemon's address space is built on it.
 */
#ifndef LAZYPAGES_EXTENT_H
#define LAZYPAGES_EXTENT_H

#include <stdint.h>

/* Values of lp_extent.source that are not levels of the chain. */
#define LP_SOURCE_REMOTE 0xfffffffeu /* LAZY; a page server has the data */
#define LP_SOURCE_LOST 0xffffffffu   /* in a pagemap, but no level has the data */

struct lp_extent {
	uint64_t start;    /* address at dump time, page aligned */
	uint64_t nr_pages; /* > 0 */
	uint64_t offset;   /* of the first page in the level's pages file, bytes */
	uint32_t source;   /* level that has the data (0: own image, 1: parent, ...), or LP_SOURCE_* */
	uint32_t lazy;     /* 1: the restorer may leave it to the daemon; 0: the restorer reads it */
};

/* Address behind the last page. */
static inline uint64_t lp_extent_end(const struct lp_extent *extent)
{
	return extent->start + extent->nr_pages * 4096;
}

#endif
