/*
 * Limits the bytes of background in flight on a connection, so that no fault waits long behind them.  The limit is twice the
 * bandwidth-delay product: the best recent rate times the shortest recent round trip.
 *
 * So the connection is always busy, and a new request waits for about one round trip's worth of data.  A single preempted or
 * delayed answer changes neither value.
 */
#ifndef LAZYPAGES_PACE_H
#define LAZYPAGES_PACE_H

#include <stdint.h>

#define LP_PACE_MIN (UINT64_C(64) << 10) /* bytes: below this, headers and round trips cost more than the wait is worth */
#define LP_PACE_MAX (UINT64_C(16) << 20)
#define LP_PACE_SHORTEST UINT64_C(200000) /* ns: shorter round trips count as this, since scheduling delays dominate them */

/* The smallest recent value: over the last one to two memory periods. */
struct lp_lowest {
	uint64_t begun; /* ns */
	double now, before;
};

struct lp_pace {
	uint64_t limit;	    /* bytes */
	uint64_t delivered; /* bytes received since the start; the caller stores it with each request */
	uint64_t smoothed;  /* round trip, ns; 0: not known */
	struct lp_lowest round_trip, slowness; /* ns; ns a byte */
};

void lp_pace_init(struct lp_pace *pace);
/* An answer of `bytes` has come to a request that was sent at `sent`, when pace->delivered was `delivered`.  Times in ns. */
void lp_pace_answered(struct lp_pace *pace, uint64_t sent, uint64_t delivered, uint64_t now, uint64_t bytes);

#endif
