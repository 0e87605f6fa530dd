/*
 * Received pages that can't be placed at the moment, because the layout of their task is changing.  They are deferred, so that the
 * following pages reach the other tasks.  Used by the serving thread only.
 */
#ifndef LAZYPAGES_DEFERRED_PAGES_H
#define LAZYPAGES_DEFERRED_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "channels.h"

#define LP_ZERO_PAGES 64ull /* pages of zeros that are placed at once */

/* LP_ZERO_PAGES pages, which stand for pages of zeros that have come without their bytes. */
extern const char *lp_zero_pages;

/* Makes lp_zero_pages.  False: no memory. */
bool lp_make_zero_pages(void);
/* Returns 0, or -EAGAIN if there is no room. */
int lp_defer_pages(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const char *bytes);
/* Places the deferred pages of the tasks that accept them now. */
void lp_place_deferred_pages(struct lp_channels *channels);
/*
 * Whether the page at dump_addr is deferred.  Shortens *end to the end of the run of pages from there for which the result is the
 * same.
 */
bool lp_pages_are_deferred(const struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t *end);
void lp_drop_deferred_pages(struct lp_channels *channels);

#endif
