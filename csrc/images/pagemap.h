/*
 * Conversion between pagemap images (images_spec/pagemap.md) and arrays.
 */
#ifndef LAZYPAGES_PAGEMAP_H
#define LAZYPAGES_PAGEMAP_H

#include <stdint.h>

#define LP_PE_PARENT 1u
#define LP_PE_LAZY 2u
#define LP_PE_PRESENT 4u

/* A run of pages in one level of a chain. */
struct lp_pagemap_entry {
	uint64_t vaddr;
	uint64_t nr_pages;
	uint32_t flags; /* LP_PE_* */
	uint32_t unused;
};

struct lp_pagemap {
	struct lp_pagemap_entry *entries;
	uint64_t count;
	uint64_t present_pages; /* number of pages that the pages file must contain */
	uint32_t pages_id;
};

/* An error in an image. offset: in the file, bytes. */
struct lp_image_error {
	uint64_t offset;
	char what[160];
};

/* Encoded entries not yet written. The caller empties the buffer. */
struct lp_pagemap_writer {
	uint8_t buffer[65536];
	uint64_t used;
	uint64_t end; /* of the last entry, bytes */
};

/*
 * Parses a whole image. Returns 0, or -1 and fills in *error. Free *map with
 * lp_pagemap_free() after success only.
 */
int lp_pagemap_parse(const uint8_t *data, uint64_t size, struct lp_pagemap *map, struct lp_image_error *error);
void lp_pagemap_free(struct lp_pagemap *map);

/*
 * Appends one entry to the buffer. Returns 0; 1 if the buffer must be emptied before
 * the next entry; -1 and fills in *error if a reader would reject the entry.
 */
int lp_pagemap_add(struct lp_pagemap_writer *writer, uint64_t vaddr, uint64_t nr_pages, uint32_t flags,
		   struct lp_image_error *error);

#endif
