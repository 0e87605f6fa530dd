/*
 * Conversion between pagemap images and arrays. Format: images_spec/pagemap.md and
 * docs/criu.md ("Pagemap"), observed with CRIU 4.1.1 and 4.2.1.
 *
 * Protobuf is decoded by hand: a million entries in a fraction of a second, 24 bytes
 * each. Whatever protobuf's own decoder rejects is rejected here. Rejected as well are
 * groups and known fields of a wrong wire type, as by CRIU's decoder (protobuf-c), and
 * numbers of more than 64 bits. Unlike with protobuf, unknown fields and flags are
 * errors: they may mean that the pages are not stored plainly (images_spec/unknown.md).
 */
#include "pagemap.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_SIZE UINT64_C(4096)

/* No user address is higher: x86_64 with five-level page tables. */
#define ADDRESS_END (UINT64_C(1) << 56)

#define COMMON_MAGIC 0x54564319u
#define PAGEMAP_MAGIC 0x56084025u

#define KNOWN_FLAGS (LP_PE_PARENT | LP_PE_LAZY | LP_PE_PRESENT)

#define UNKNOWN "which this lazypages does not know: written by a newer CRIU?"

enum wire_type { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

/* The longest record: its length, and four fields with their tags. */
#define RECORD_MAX (4 + 11 + 6 + 2 + 11)

/* One field of a message. */
struct field {
	uint32_t number;
	uint32_t type;
	uint64_t value; /* of a varint */
};

__attribute__((format(printf, 3, 4))) static int fail(struct lp_image_error *error, uint64_t offset,
						       const char *format, ...)
{
	va_list arguments;

	error->offset = offset;
	va_start(arguments, format);
	vsnprintf(error->what, sizeof(error->what), format, arguments);
	va_end(arguments);
	return -1;
}

static uint32_t get_u32(const uint8_t *at)
{
	return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static void put_u32(uint8_t *at, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		at[i] = (uint8_t)(value >> 8 * i);
}

/* Both functions return the position behind what they have read, or NULL. */
static const uint8_t *take_varint(const uint8_t *at, const uint8_t *end, uint64_t *value)
{
	uint64_t result = 0;

	for (unsigned int shift = 0; shift < 64 && at < end; shift += 7) {
		uint8_t byte = *at++;

		if (shift == 63 && byte > 1)
			return NULL;
		result |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80)) {
			*value = result;
			return at;
		}
	}
	return NULL;
}

static const uint8_t *take_field(const uint8_t *at, const uint8_t *end, struct field *field)
{
	const uint8_t *start = at;
	uint64_t tag, skip;

	at = take_varint(at, end, &tag);
	if (!at || at - start > 5 || tag > UINT32_MAX || tag < 8)
		return NULL;
	field->number = (uint32_t)tag >> 3;
	field->type = tag & 7;
	field->value = 0;
	switch (field->type) {
	case WIRE_VARINT:
		return take_varint(at, end, &field->value);
	case WIRE_BYTES:
		at = take_varint(at, end, &skip);
		if (!at)
			return NULL;
		break;
	case WIRE_FIXED64:
		skip = 8;
		break;
	case WIRE_FIXED32:
		skip = 4;
		break;
	default:
		return NULL;
	}
	return skip <= (uint64_t)(end - at) ? at + skip : NULL;
}

static int parse_head(const uint8_t *at, const uint8_t *end, uint64_t offset, uint32_t *pages_id,
		      struct lp_image_error *error)
{
	int found = 0;

	while (at < end) {
		struct field field;

		at = take_field(at, end, &field);
		if (!at || (field.number == 1 && field.type != WIRE_VARINT))
			return fail(error, offset, "PagemapHead can't be decoded");
		if (field.number != 1)
			return fail(error, offset, "the head has field %" PRIu32 ", " UNKNOWN, field.number);
		*pages_id = (uint32_t)field.value;
		found = 1;
	}
	return found ? 0 : fail(error, offset, "PagemapHead lacks pages_id");
}

/* Decodes one entry. number: its index, from 1, for messages. */
static int decode_entry(const uint8_t *at, const uint8_t *end, uint64_t number, uint64_t offset,
			struct lp_pagemap_entry *entry, struct lp_image_error *error)
{
	uint32_t compat_nr_pages = 0, flags = 0;
	uint64_t vaddr = 0, nr_pages = 0;
	unsigned int found = 0;
	int in_parent = 0;

	while (at < end) {
		struct field field;

		at = take_field(at, end, &field);
		if (!at || (field.number <= 5 && field.type != WIRE_VARINT))
			return fail(error, offset, "PagemapEntry can't be decoded");
		switch (field.number) {
		case 1:
			vaddr = field.value;
			break;
		case 2:
			compat_nr_pages = (uint32_t)field.value;
			break;
		case 3:
			in_parent = field.value != 0;
			break;
		case 4:
			if (field.value & ~(uint64_t)KNOWN_FLAGS)
				return fail(error, offset, "entry %" PRIu64 " has flags %#" PRIx64 ", of them %#" PRIx64 ", " UNKNOWN,
					    number, field.value, field.value & ~(uint64_t)KNOWN_FLAGS);
			flags = (uint32_t)field.value;
			break;
		case 5:
			nr_pages = field.value;
			break;
		default:
			return fail(error, offset, "entry %" PRIu64 " has field %" PRIu32 ", " UNKNOWN, number, field.number);
		}
		found |= 1u << field.number;
	}
	if (!(found & 1u << 1))
		return fail(error, offset, "PagemapEntry lacks vaddr");
	if (!(found & 1u << 2))
		return fail(error, offset, "PagemapEntry lacks compat_nr_pages");
	entry->vaddr = vaddr;
	entry->nr_pages = found & 1u << 5 ? nr_pages : compat_nr_pages;
	/* An entry without flags is from a CRIU that had none: in_parent alone tells where the data is. */
	entry->flags = found & 1u << 4 ? flags : in_parent ? 0 : LP_PE_PRESENT;
	if (in_parent)
		entry->flags |= LP_PE_PARENT;
	entry->unused = 0;
	return 0;
}

/* Checks that reader and writer have in common. before: the end of the preceding entry. */
static int check_entry(const struct lp_pagemap_entry *entry, uint64_t before, uint64_t offset,
		       struct lp_image_error *error)
{
	if (entry->vaddr % PAGE_SIZE)
		return fail(error, offset, "address %#" PRIx64 " is not page aligned", entry->vaddr);
	if (entry->nr_pages == 0)
		return fail(error, offset, "entry at %#" PRIx64 " has no pages", entry->vaddr);
	if (entry->vaddr >= ADDRESS_END || entry->nr_pages > (ADDRESS_END - entry->vaddr) / PAGE_SIZE)
		return fail(error, offset, "%" PRIu64 " pages at %#" PRIx64 " do not fit an address space",
			    entry->nr_pages, entry->vaddr);
	if (entry->flags & ~KNOWN_FLAGS)
		return fail(error, offset, "entry at %#" PRIx64 " has unknown flags %#x", entry->vaddr, entry->flags);
	if (entry->vaddr < before)
		return fail(error, offset,
			    "entry at %#" PRIx64 " is not sorted or overlaps the one before it, which ends at %#" PRIx64,
			    entry->vaddr, before);
	return 0;
}

static uint64_t entry_end(const struct lp_pagemap_entry *entry)
{
	return entry->vaddr + entry->nr_pages * PAGE_SIZE;
}

/* Offset of the first record, or 0 on an error. */
static uint64_t skip_magics(const uint8_t *data, uint64_t size, struct lp_image_error *error)
{
	uint64_t place = size >= 4 && get_u32(data) == COMMON_MAGIC ? 4 : 0;

	if (size < place + 4)
		fail(error, size, "truncated in its magic");
	else if (get_u32(data + place) != PAGEMAP_MAGIC)
		fail(error, place, "magic 0x%08x, but pagemap-*.img has 0x%08x", get_u32(data + place), PAGEMAP_MAGIC);
	else
		return place + 4;
	return 0;
}

/* Counts the records by their lengths. */
static int count_records(const uint8_t *data, uint64_t size, uint64_t place, uint64_t *count,
			 struct lp_image_error *error)
{
	*count = 0;
	while (place < size) {
		uint64_t left = size - place, length;

		if (left < 4)
			return fail(error, place, "truncated in the length of a message");
		length = get_u32(data + place);
		if (length > left - 4)
			return fail(error, place, "message of %" PRIu64 " bytes, but %" PRIu64 " are left", length,
				    left - 4);
		place += 4 + length;
		++*count;
	}
	return *count ? 0 : fail(error, place, "holds no message");
}

int lp_pagemap_parse(const uint8_t *data, uint64_t size, struct lp_pagemap *map, struct lp_image_error *error)
{
	uint64_t place, records, before = 0, length;

	memset(map, 0, sizeof(*map));
	place = skip_magics(data, size, error);
	if (!place || count_records(data, size, place, &records, error))
		return -1;

	length = get_u32(data + place);
	place += 4;
	if (parse_head(data + place, data + place + length, place, &map->pages_id, error))
		return -1;
	place += length;

	/* One of the records is the head, so this is one entry more than needed, and never 0. */
	map->entries = calloc(records, sizeof(*map->entries));
	if (!map->entries)
		return fail(error, place, "no memory for %" PRIu64 " entries", records - 1);
	for (map->count = 0; map->count < records - 1; map->count++) {
		struct lp_pagemap_entry *entry = &map->entries[map->count];

		length = get_u32(data + place);
		place += 4;
		if (decode_entry(data + place, data + place + length, map->count + 1, place, entry, error) ||
		    check_entry(entry, before, place, error)) {
			lp_pagemap_free(map);
			return -1;
		}
		place += length;
		before = entry_end(entry);
		if (entry->flags & LP_PE_PRESENT)
			map->present_pages += entry->nr_pages;
	}
	return 0;
}

void lp_pagemap_free(struct lp_pagemap *map)
{
	free(map->entries);
	map->entries = NULL;
}

static uint8_t *put_varint_field(uint8_t *at, uint32_t number, uint64_t value)
{
	*at++ = (uint8_t)(number << 3 | WIRE_VARINT);
	for (; value >= 0x80; value >>= 7)
		*at++ = (uint8_t)(value | 0x80);
	*at++ = (uint8_t)value;
	return at;
}

int lp_pagemap_add(struct lp_pagemap_writer *writer, uint64_t vaddr, uint64_t nr_pages, uint32_t flags,
		   struct lp_image_error *error)
{
	struct lp_pagemap_entry entry = {.vaddr = vaddr, .nr_pages = nr_pages, .flags = flags};
	uint8_t *record = writer->buffer + writer->used, *at = record + 4;

	if (check_entry(&entry, writer->end, 0, error))
		return -1;
	at = put_varint_field(at, 1, vaddr);
	at = put_varint_field(at, 2, nr_pages <= UINT32_MAX ? nr_pages : 0);
	at = put_varint_field(at, 4, flags);
	at = put_varint_field(at, 5, nr_pages);
	put_u32(record, (uint32_t)(at - record - 4));
	writer->used += (uint64_t)(at - record);
	writer->end = entry_end(&entry);
	return writer->used > sizeof(writer->buffer) - RECORD_MAX;
}
