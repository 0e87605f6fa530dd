/*
 * What is counted about a task, and the threads that wait for remote pages: they are known for the sake of their service time.
 */
#ifndef LAZYPAGES_STATS_H
#define LAZYPAGES_STATS_H

#include "serving.h"

/* The index of a source in counters by source. */
uint32_t lp_source_index(const struct lp_task *t, uint32_t source);
/* `times` faults on one of the pages at addr have their page now; the first was read at `since`.  Returns how long ago, ns. */
uint64_t lp_count_answered(struct lp_task *t, uint64_t since, uint32_t times, uint16_t source, uint64_t addr, uint64_t pages);
/* Pages of each source have been dropped. */
void lp_count_dropped(struct lp_task *t, const uint64_t *by_source);
/* Pages [skip, skip + nr) of a claimed run are not waited for any more, though they were not copied. */
void lp_drop_pages(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr);

void lp_begin_wait(struct lp_task *t, struct lp_waiter waiter);
/* Pages dumped at [dump_addr, end) have come from a remote source (served), or won't come. */
void lp_end_wait(struct lp_task *t, uint64_t dump_addr, uint64_t end, bool served);
/* Threads that wait. */
size_t lp_nr_waiting(struct lp_task *t);

#endif
