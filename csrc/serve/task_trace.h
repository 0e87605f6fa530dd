/* Trace records about a task.  While there is no trace, each of these costs one test. */
#ifndef LAZYPAGES_TASK_TRACE_H
#define LAZYPAGES_TASK_TRACE_H

#include "common/clock.h"
#include "serving.h"
#include "trace.h"

static inline uint16_t lp_trace_source(uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return LP_TRACE_REMOTE;
	return source == LP_SOURCE_LOST ? LP_TRACE_NOWHERE : (uint16_t)source;
}

/* (There is a trace.) */
static inline void lp_task_trace_at(const struct lp_task *t, uint64_t time, enum lp_trace_kind kind, uint16_t source,
				    uint64_t addr, uint64_t pages, uint64_t detail, uint32_t times)
{
	lp_trace_put(t->engine->trace, &(struct lp_trace_record){
					       .time = time,
					       .addr = addr,
					       .pages = pages,
					       .detail = detail,
					       .task = (uint32_t)t->tag,
					       .memory = t->number,
					       .kind = kind,
					       .source = source,
					       .times = times,
				       });
}

/* That something happens now. */
static inline void lp_task_trace(const struct lp_task *t, enum lp_trace_kind kind, uint16_t source, uint64_t addr,
				 uint64_t pages, uint64_t detail)
{
	if (t->engine->trace)
		lp_task_trace_at(t, lp_now_ns(), kind, source, addr, pages, detail, 0);
}

/* When something begins that lp_task_trace_took is about; 0: there is no trace. */
static inline uint64_t lp_task_trace_begin(const struct lp_task *t)
{
	return t->engine->trace ? lp_now_ns() : 0;
}

static inline void lp_task_trace_took(const struct lp_task *t, uint64_t begun, enum lp_trace_kind kind, uint16_t source,
				      uint64_t addr, uint64_t pages)
{
	uint64_t now = begun ? lp_now_ns() : 0;

	if (begun)
		lp_task_trace_at(t, now, kind, source, addr, pages, now - begun, 0);
}

#endif
