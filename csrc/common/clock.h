/* CLOCK_MONOTONIC in nanoseconds: the unit of every time and duration in C. */
#ifndef LAZYPAGES_CLOCK_H
#define LAZYPAGES_CLOCK_H

#include <stdint.h>
#include <time.h>

#define LP_NS 1000000000ull /* per second */

static inline uint64_t lp_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * LP_NS + (uint64_t)ts.tv_nsec;
}

#endif
