/*
 * One level of the chain of images: where its pages are read from.  The engine knows nothing else about a source whose pages are
 * on this machine: a new kind of source fills this structure.
 */
#ifndef LAZYPAGES_LEVEL_H
#define LAZYPAGES_LEVEL_H

#include <stddef.h>
#include <stdint.h>

struct lp_level {
	const void *base; /* its bytes, in this process; NULL: it has none */
	uint64_t size;	  /* bytes */
	int fd;		  /* the kind's */
	/*
	 * How many of the pages at offset, from the first on, can be copied.  It is asked before a copy and after it: the answer
	 * may become smaller.
	 */
	uint64_t (*held)(const struct lp_level *level, uint64_t offset, uint64_t nr_pages);
	/*
	 * Reads pages into a buffer: an alternative to copying them from base, which may read more from a disk than is asked for.
	 * Returns the number of pages, from the first one on, that could be read and were held then; 0 or -errno: none.
	 */
	int64_t (*read)(const struct lp_level *level, void *buffer, uint64_t offset, uint64_t nr_pages);
	/* The bytes around offset may be needed: begins to read them, without waiting. */
	void (*around)(const struct lp_level *level, uint64_t offset, uint64_t size);
	/* These bytes are copied soon: makes them cheap to read, and may block for that.  No error: the copy will meet it. */
	void (*prefetch)(const struct lp_level *level, uint64_t offset, uint64_t size);
};

/* A pages file: its first `size` bytes, mapped at base; and the file, open, to see how long it still is. */
void lp_level_of_file(struct lp_level *level, const void *base, uint64_t size, int fd);

#endif
