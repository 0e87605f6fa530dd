/* A pagemap image of somebody else's: what is taken from it is sorted, fits, and is written and read again as the same. */
#include "images/pagemap.h"

#include "fuzz.h"

static void check_again(const struct lp_pagemap *map)
{
	static struct lp_pagemap_writer writer;
	static uint8_t image[1 << 20];
	struct lp_image_error error;
	struct lp_pagemap again;
	size_t size = 0;
	const uint8_t head[] = {0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 1};

	memcpy(image, head, sizeof(head));
	size = sizeof(head);
	writer.used = writer.end = 0;
	for (uint64_t i = 0; i < map->count; i++) {
		const struct lp_pagemap_entry *entry = &map->entries[i];
		int rc = lp_pagemap_add(&writer, entry->vaddr, entry->nr_pages, entry->flags, &error);

		CHECK(rc >= 0);
		if (rc || i + 1 == map->count) {
			if (size + writer.used > sizeof(image))
				return;
			memcpy(image + size, writer.buffer, writer.used);
			size += writer.used;
			writer.used = 0;
		}
	}
	CHECK(!lp_pagemap_parse(image, size, &again, &error));
	CHECK(again.count == map->count && again.present_pages == map->present_pages && again.pages_id == 1);
	CHECK(!map->count || !memcmp(again.entries, map->entries, map->count * sizeof(*map->entries)));
	lp_pagemap_free(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct lp_image_error error = {0};
	struct lp_pagemap map;
	uint64_t end = 0, present = 0;

	if (lp_pagemap_parse(data, size, &map, &error)) {
		CHECK(error.offset <= size && memchr(error.what, 0, sizeof(error.what)) && error.what[0]);
		return 0;
	}
	for (uint64_t i = 0; i < map.count; i++) {
		const struct lp_pagemap_entry *entry = &map.entries[i];

		CHECK(entry->vaddr % PAGE == 0 && entry->vaddr >= end && entry->nr_pages);
		CHECK(entry->nr_pages <= (((uint64_t)1 << 56) - entry->vaddr) / PAGE);
		CHECK(!(entry->flags & ~7u) && !entry->unused);
		end = entry->vaddr + entry->nr_pages * PAGE;
		present += entry->flags & LP_PE_PRESENT ? entry->nr_pages : 0;
	}
	CHECK(present == map.present_pages);
	check_again(&map);
	lp_pagemap_free(&map);
	return 0;
}
