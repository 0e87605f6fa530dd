#ifndef LP_SINK_H
#define LP_SINK_H

#include "serve/channels.h"

struct lp_sink;

typedef int (*lp_sink_place)(void *arg, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const void *bytes);

struct lp_sink *lp_sink_new(lp_sink_place place, void *arg);
struct lp_channels *lp_sink_channels(struct lp_sink *sink);
void lp_sink_run(struct lp_sink *sink);
void lp_sink_stop(struct lp_sink *sink);
void lp_sink_free(struct lp_sink *sink);

#endif
