/*
 * A run of pages of one task, and where their bytes are.
 *
 * images_spec's placement rule produces a sorted array of these from a
 * pagemap and its parents; the daemon's address space is built on it.
 */
#ifndef LAZYPAGES_EXTENT_H
#define LAZYPAGES_EXTENT_H

#include <stdint.h>

/* Values of lp_extent.source from here up are not levels of the chain. */
#define LP_SOURCE_REMOTE 0xfffffffeu /* LAZY, its data is at a page server */
#define LP_SOURCE_LOST 0xffffffffu   /* promised by a pagemap, held by no level */

struct lp_extent {
	uint64_t start;    /* address at dump time, page aligned */
	uint64_t nr_pages; /* > 0 */
	uint64_t offset;   /* of the first page in the level's pages file, bytes */
	uint32_t source;   /* level that holds the data: 0 own image, 1 parent, 2 ... ; or LP_SOURCE_* */
	uint32_t lazy;     /* 1: the restorer leaves it to the daemon; 0: read at restore */
};

#endif
