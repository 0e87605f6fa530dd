/*
 * Headers of the page server protocol, as in lazypages/net/wire.py and docs/protocol.md; native-endian.
 *
 * There are two layouts: 24 bytes, up to CRIU 4.1.1, and 32 bytes, from CRIU 4.2 on and between our own client and server.
 */
#ifndef LAZYPAGES_PAGE_PROTOCOL_H
#define LAZYPAGES_PAGE_PROTOCOL_H

#include <stdint.h>
#include <string.h>

enum lp_command {
	LP_COMMAND_ADD = 1,
	LP_COMMAND_ADD_F = 6,
	LP_COMMAND_GET = 7,
	LP_COMMAND_CLOSE = 0x1023,
	LP_COMMAND_FORCE_CLOSE = 0x1024,
	LP_COMMAND_COMPLETED = 0x4C02, /* ours: another destination has all of the dump */
};

enum lp_page_flags {
	LP_PAGES_PRESENT = 4,
	LP_PAGES_ZERO = 0x100, /* ours: no bytes follow */
	LP_PAGES_ZSTD = 0x200, /* ours, in a GET: the answer may be compressed */
};

#define LP_HEADER_OLD 24u
#define LP_HEADER_NEW 32u

struct lp_header {
	uint32_t command; /* an lp_command, or an unknown value from the peer */
	uint32_t flags;
	uint64_t nr_pages, vaddr;
	uint64_t dst_id; /* in a GET and its answer: the task */
};

struct lp_header_old {
	uint32_t word, nr_pages;
	uint64_t vaddr, dst_id;
};

struct lp_header_new {
	uint32_t word, padding;
	uint64_t nr_pages, vaddr, dst_id;
};

_Static_assert(sizeof(struct lp_header_old) == LP_HEADER_OLD && sizeof(struct lp_header_new) == LP_HEADER_NEW, "no padding");

/* Decodes a header of `size` (LP_HEADER_OLD or LP_HEADER_NEW) bytes. */
static inline struct lp_header lp_header_read(uint32_t size, const void *bytes)
{
	struct lp_header_old old;
	struct lp_header_new new;

	if (size == LP_HEADER_OLD) {
		memcpy(&old, bytes, sizeof(old));
		return (struct lp_header){old.word & 0xFFFF, old.word >> 16, old.nr_pages, old.vaddr, old.dst_id};
	}
	memcpy(&new, bytes, sizeof(new));
	return (struct lp_header){new.word & 0xFFFF, new.word >> 16, new.nr_pages, new.vaddr, new.dst_id};
}

/* Encodes a header to `size` (LP_HEADER_OLD or LP_HEADER_NEW) bytes. */
static inline void lp_header_write(uint32_t size, void *bytes, struct lp_header header)
{
	uint32_t word = header.command | header.flags << 16;
	struct lp_header_old old = {word, (uint32_t)header.nr_pages, header.vaddr, header.dst_id};
	struct lp_header_new new = {word, 0, header.nr_pages, header.vaddr, header.dst_id};

	memcpy(bytes, size == LP_HEADER_OLD ? (const void *)&old : (const void *)&new, size);
}

#endif
