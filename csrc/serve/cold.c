#include "cold.h"

#include "common/clock.h"

/* A page that is in the page cache is read in 1 us, one of a solid-state disk in 50 or more. */
#define SLOW_NS UINT64_C(20000)
#define SLOW_PAGE_NS UINT64_C(2000) /* for each page of the read, besides */
#define LONG_WAIT_NS (LP_NS / 1000)
/* Waits are long for other reasons, too.  Between two tries that find no slow read: */
#define PAUSE_MIN (LP_NS / 100)
#define PAUSE_MAX LP_NS

#define AROUND (UINT64_C(256) << 10) /* the next read waits for it: 0.3 ms on a disk of 1 GB/s */
#define AROUND_FIRST (UINT64_C(8) << 20)
#define EARNED AROUND /* by each fast read */
#define EARNED_MOST (UINT64_C(64) << 20) /* and not yet spent */

bool lp_cold_expected(const struct lp_cold *c)
{
	return c->fast < LP_COLD_READS;
}

void lp_cold_read(struct lp_cold *c, uint64_t now, uint64_t ns, uint64_t nr_pages)
{
	if (ns > SLOW_NS + nr_pages * SLOW_PAGE_NS) {
		c->fast = 0;
		c->pause = 0;
		return;
	}
	if (c->earned < c->spent + EARNED_MOST)
		c->earned += EARNED;
	if (++c->fast == LP_COLD_READS) {
		c->pause = !c->pause ? PAUSE_MIN : c->pause < PAUSE_MAX / 2 ? c->pause * 2 : PAUSE_MAX;
		c->not_before = now + c->pause;
	}
}

uint64_t lp_cold_around(struct lp_cold *c)
{
	if (c->fast || c->spent + AROUND > AROUND_FIRST + c->earned)
		return 0;
	c->spent += AROUND;
	return AROUND;
}

void lp_cold_waited(struct lp_cold *c, uint64_t now, uint64_t ns)
{
	if (ns > LONG_WAIT_NS && now >= c->not_before && !lp_cold_expected(c))
		c->fast = LP_COLD_READS - LP_COLD_TRIES;
}
