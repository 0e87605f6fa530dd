/*
 * Pages from elsewhere: claimed, delivered, given up.  (csrc/serve/engine.h has what the owner calls.)
 */
#ifndef LAZYPAGES_DELIVER_H
#define LAZYPAGES_DELIVER_H

#include "serving.h"

/*
 * For a channel: claims up to max_pages for the background, round again at the end.  0 when nothing is left; -EAGAIN when a layout
 * event is in the way.  (the serving thread)
 */
int64_t lp_claim_background(struct lp_task *t, uint64_t max_pages, uint64_t *dump_addr);

#endif
