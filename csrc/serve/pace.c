#include "pace.h"

#include <float.h>

#define ROUND_TRIP_MEMORY UINT64_C(5000000000) /* memory period of the shortest round trip, ns */
#define RATE_MEMORY UINT64_C(1000000000)       /* of the best rate, ns */

static double lowest_of(struct lp_lowest *l, uint64_t now, double value, uint64_t memory)
{
	if (now - l->begun > memory) {
		l->before = now - l->begun > 2 * memory ? value : l->now;
		l->now = value;
		l->begun = now;
	} else if (value < l->now) {
		l->now = value;
	}
	return l->now < l->before ? l->now : l->before;
}

void lp_pace_init(struct lp_pace *p)
{
	const struct lp_lowest none = {.now = DBL_MAX, .before = DBL_MAX};

	*p = (struct lp_pace){.limit = LP_PACE_MIN, .round_trip = none, .slowness = none};
}

void lp_pace_answered(struct lp_pace *p, uint64_t sent, uint64_t delivered, uint64_t now, uint64_t bytes)
{
	uint64_t elapsed = now > sent ? now - sent : 1;
	double shortest = lowest_of(&p->round_trip, now, (double)elapsed, ROUND_TRIP_MEMORY), limit;

	p->delivered += bytes;
	p->smoothed = p->smoothed ? (p->smoothed * 7 + elapsed) / 8 : elapsed;
	if (p->delivered == delivered)
		return;
	limit = 2 * (shortest > LP_PACE_SHORTEST ? shortest : LP_PACE_SHORTEST) /
		lowest_of(&p->slowness, now, (double)elapsed / (double)(p->delivered - delivered), RATE_MEMORY);
	p->limit = limit < LP_PACE_MIN ? LP_PACE_MIN : limit > LP_PACE_MAX ? LP_PACE_MAX : (uint64_t)limit;
}
