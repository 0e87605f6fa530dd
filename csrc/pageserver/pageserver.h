/*
 * The part of a page server that runs once for each fault of a client: reads
 * GETs from a socket and answers them from pages files.
 *
 * Each connection has a thread, because reading a page that is not in the page cache
 * waits for the disk, and sending to a slow client waits for the client; the
 * other connections go on. Any other message, and a GET of a page that
 * is not here or can't be read, is returned to the caller.  Pages are read into a buffer
 * that fits in the CPU's cache, and sent once the file is known to contain them
 * (pages_file.h).
 *
 * An answer ends before a page that can't be read.  An answer longer than the
 * buffer has announced its pages before they are read; if one of them then can't be read, the connection is
 * closed, and from then on no answer from that file is longer than the buffer.
 */
#ifndef LAZYPAGES_PAGESERVER_H
#define LAZYPAGES_PAGESERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/extent.h"

/* A pages file, opened for reading. */
struct lp_pages_file {
	uint64_t size; /* bytes, at the time of opening */
	int32_t fd;
	uint32_t number;  /* identifies it for the caller */
	uint32_t damaged; /* set here: a read has failed */
};

/* The place of each page of one task. */
struct lp_task_pages {
	uint64_t pid;
	const struct lp_extent *extents; /* sorted */
	uint64_t nr_extents;
	struct lp_pages_file *const *levels; /* NULL: the level has no data */
	uint32_t nr_levels;
};

/* Everything that is served; read only. */
struct lp_served {
	const struct lp_task_pages *tasks; /* sorted by pid */
	uint64_t nr_tasks;
};

/* A part of an answer: bytes of one file. */
struct lp_piece {
	struct lp_pages_file *file;
	uint64_t offset; /* bytes */
	uint64_t size;
};

/* Negotiated features (lazypages/net/wire.py). */
#define LP_FEATURE_ZERO 4u

#define LP_REQUESTS_SIZE 16384 /* bytes of requests received at once */
#define LP_BUFFER_SIZE 262144  /* bytes of pages read at once */

/* A connection to a client. */
struct lp_client {
	int32_t fd;	      /* a blocking stream socket */
	uint32_t header_size; /* 24 or 32: CRIU up to 4.1.1, or from 4.2 (docs/criu.md, "Page server protocol") */
	uint32_t features;
	uint32_t max_pages; /* limit of one answer */
	uint64_t pages;	    /* sent so far */
	uint64_t poll_ns;   /* how long to poll for the next request before sleeping; adaptive */
	uint64_t patience_ns; /* time limit for the rest of a request that has arrived in part */
	uint32_t start, end;
	uint8_t requests[LP_REQUESTS_SIZE]; /* received and not yet answered: [start, end) */
	uint8_t buffer[LP_BUFFER_SIZE];	    /* pages */
};

enum lp_client_state {
	LP_CLIENT_EOF,	/* the client has closed; a part of a request may remain */
	LP_CLIENT_OTHER /* the caller has to handle the next message */
};

/*
 * Finds the first pages of a range, up to all of them. Stores at most `max` pieces
 * and returns their number; 0: the first page is not here.
 */
size_t lp_find_pages(const struct lp_served *served, uint64_t pid, uint64_t vaddr, uint64_t nr_pages,
		     struct lp_piece *pieces, size_t max);

/*
 * Answers GETs until the caller has something to do. Returns an lp_client_state, or
 * -errno of the socket; -ETIMEDOUT: the rest of a request did not arrive in time;
 * -EFAULT: pages already announced could not be read.
 */
int lp_answer_gets(struct lp_client *client, const struct lp_served *served);

#endif
