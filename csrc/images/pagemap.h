/*
 * Pagemap images (images_spec/pagemap.md) to and from arrays.
 */
#ifndef LAZYPAGES_PAGEMAP_H
#define LAZYPAGES_PAGEMAP_H

#include <stdint.h>

#define LP_PE_PARENT 1u
#define LP_PE_LAZY 2u
#define LP_PE_PRESENT 4u

/* A run of pages as one level of a chain tells of it. */
struct lp_pagemap_entry {
	uint64_t vaddr;
	uint64_t nr_pages;
	uint32_t flags; /* LP_PE_* */
	uint32_t unused;
};

struct lp_pagemap {
	struct lp_pagemap_entry *entries;
	uint64_t count;
	uint64_t present_pages; /* how many the pages file must hold */
	uint32_t pages_id;
};

/* What is wrong with an image, and where. */
struct lp_image_error {
	uint64_t offset;
	char what[160];
};

/* Entries on their way to a file. The caller empties the buffer. */
struct lp_pagemap_writer {
	uint8_t buffer[65536];
	uint64_t used;
	uint64_t end; /* of the last entry, bytes */
};

/*
 * Parses a whole image. 0, or -1 with *error filled in. *map is to be freed
 * with lp_pagemap_free after success only.
 */
int lp_pagemap_parse(const uint8_t *data, uint64_t size, struct lp_pagemap *map, struct lp_image_error *error);
void lp_pagemap_free(struct lp_pagemap *map);

/*
 * Puts one entry into the buffer. 0; 1 when the buffer must be emptied before
 * the next one; -1 with *error filled in when a reader would refuse the entry.
 */
int lp_pagemap_add(struct lp_pagemap_writer *writer, uint64_t vaddr, uint64_t nr_pages, uint32_t flags,
		   struct lp_image_error *error);

#endif
