/*
 * The part of a page server that runs once for each fault of a client's: reads
 * GETs from a socket and answers them from pages files.
 *
 * One thread for each connection, because a page that is not in the page cache
 * keeps its reader waiting for the disk, and a client that does not read keeps
 * its writer waiting; the others go on. What is not a plain GET of a page that
 * is here and can be read is left to the caller.  Pages are read into a buffer
 * that stays in the CPU's cache, and sent when it is known that the file still
 * holds them (pages_file.h).
 *
 * An answer ends before a page that can't be read.  One that is longer than the
 * buffer has promised its pages by then: the connection is given up, and from
 * then on no answer out of that file is longer than the buffer.
 */
#ifndef LAZYPAGES_PAGESERVER_H
#define LAZYPAGES_PAGESERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/extent.h"

/* A pages file, open for reading. */
struct lp_pages_file {
	uint64_t size; /* bytes, when it was opened */
	int32_t fd;
	uint32_t number;  /* the caller's name for it */
	uint32_t damaged; /* a read has failed; set here */
};

/* Where each page of one task is. */
struct lp_task_pages {
	uint64_t pid;
	const struct lp_extent *extents; /* sorted */
	uint64_t nr_extents;
	struct lp_pages_file *const *levels; /* NULL: a level without data */
	uint32_t nr_levels;
};

/* All that is served; read only. */
struct lp_served {
	const struct lp_task_pages *tasks; /* sorted by pid */
	uint64_t nr_tasks;
};

/* A part of an answer. */
struct lp_piece {
	struct lp_pages_file *file;
	uint64_t offset; /* bytes */
	uint64_t size;
};

/* Features that were granted (lazypages/net/wire.py). */
#define LP_FEATURE_ZERO 4u

#define LP_REQUESTS_SIZE 16384 /* bytes of requests that are received at once */
#define LP_BUFFER_SIZE 262144  /* bytes of pages that are read at once */

/* A connection to a client. */
struct lp_client {
	int32_t fd;	      /* a blocking stream socket */
	uint32_t header_size; /* 24 or 32: which of CRIU's layouts */
	uint32_t features;
	uint32_t max_pages; /* of one answer */
	uint64_t pages;	    /* answered so far */
	uint64_t poll_ns;   /* how long to look for the next request before sleeping; adapts itself */
	uint64_t patience_ns; /* for the rest of a request, once a part of it is there */
	uint32_t start, end;
	uint8_t requests[LP_REQUESTS_SIZE]; /* received and not yet answered: [start, end) */
	uint8_t buffer[LP_BUFFER_SIZE];	    /* pages */
};

enum lp_client_state {
	LP_CLIENT_EOF,	/* the client has closed; part of a request may be left */
	LP_CLIENT_OTHER /* the next message is not for us */
};

/*
 * The first pages of a range, up to all of them: how many pieces they are in,
 * at most `max`. 0: the first page is not here.
 */
size_t lp_find_pages(const struct lp_served *served, uint64_t pid, uint64_t vaddr, uint64_t nr_pages,
		     struct lp_piece *pieces, size_t max);

/*
 * Answers GETs until there is something else to do: an lp_client_state, or
 * -errno of the socket; -ETIMEDOUT: the rest of a request did not come in time;
 * -EFAULT: pages that had been promised could not be read.
 */
int lp_answer_gets(struct lp_client *client, const struct lp_served *served);

#endif
