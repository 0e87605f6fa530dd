/*
 * Whether pages are likely to come from a disk, and not from the page cache: known from how long reads take.
 *
 * A fault in a mapping of a file reads up to the disk's read_ahead_kb around its page, 8 MiB on some machines, and a thread waits
 * for all of it (mm/filemap.c, do_sync_mmap_readahead).  read(2) reads what it is asked for, and more only if the reads before
 * were of the pages before.  So as long as reads are slow, the pages of faults are read, and copied once more.
 *
 * What is around them is read when their threads run on, for nobody waits for that but the next read.  It pays if later faults find
 * it, as in a small image they soon do: each read that was fast allows for more of it.
 */
#ifndef LAZYPAGES_COLD_H
#define LAZYPAGES_COLD_H

#include <stdbool.h>
#include <stdint.h>

#define LP_COLD_READS 16u /* fast ones in a row: the pages are in the page cache */
#define LP_COLD_TRIES 4u  /* the same after a fault has waited long, for whatever reason */

/* All zeros: slow reads are expected. */
struct lp_cold {
	uint32_t fast;	     /* reads in a row */
	uint64_t not_before; /* ns: a wait that was long means nothing until then */
	uint64_t pause;	     /* ns */
	uint64_t spent, earned; /* bytes that were read around faults, and that fast reads have allowed for */
};

/* Whether the next pages are to be read, rather than copied from the mapping. */
bool lp_cold_expected(const struct lp_cold *c);
/* A read of nr_pages has taken so many ns. */
void lp_cold_read(struct lp_cold *c, uint64_t now, uint64_t ns, uint64_t nr_pages);
/* How many bytes to read around the pages that were just read. */
uint64_t lp_cold_around(struct lp_cold *c);
/* The thread of a fault whose pages were copied from the mapping has waited so many ns. */
void lp_cold_waited(struct lp_cold *c, uint64_t now, uint64_t ns);

#endif
