/*
 * How many bytes of the background may be on their way on a connection, so that a fault never waits long behind them: twice
 * what the connection holds, the best rate of late times the shortest round trip of late.
 *
 * So there is always enough on its way to keep the connection busy, and what is asked for now waits for about one round
 * trip's worth of data.  A moment in which somebody else has the CPU changes neither.
 */
#ifndef LAZYPAGES_PACE_H
#define LAZYPAGES_PACE_H

#include <stdint.h>

#define LP_PACE_MIN (UINT64_C(64) << 10) /* bytes: below this, headers and round trips cost more than the wait is worth */
#define LP_PACE_MAX (UINT64_C(16) << 20)
#define LP_PACE_SHORTEST UINT64_C(200000) /* ns: shorter round trips are reckoned as this: schedulers matter more there */

/* The smallest value of late: between one and two times as far back as it is remembered. */
struct lp_lowest {
	uint64_t begun; /* ns */
	double now, before;
};

struct lp_pace {
	uint64_t limit;	    /* bytes */
	uint64_t delivered; /* bytes, ever: to be remembered of a request when it is sent */
	uint64_t smoothed;  /* round trip, ns; 0: not known */
	struct lp_lowest round_trip, slowness; /* ns; ns a byte */
};

void lp_pace_init(struct lp_pace *pace);
/* An answer of so many bytes has come to what was sent at `sent`, when `delivered` was the above.  Times in ns. */
void lp_pace_answered(struct lp_pace *pace, uint64_t sent, uint64_t delivered, uint64_t now, uint64_t bytes);

#endif
