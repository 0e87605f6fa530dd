#include "cold.h"

#include "common/clock.h"

/* A page that is in the page cache is read in 1 us, one of a solid-state disk in 50 or more. */
#define SLOW_NS UINT64_C(20000)
#define SLOW_PAGE_NS UINT64_C(2000) /* for each page of the read, besides */
#define LONG_WAIT_NS (LP_NS / 1000)
/* Waits are long for other reasons, too.  Between two tries that find no slow read: */
#define PAUSE_MIN (LP_NS / 100)
#define PAUSE_MAX LP_NS

bool lp_cold_expected(const struct lp_cold *c)
{
	return c->fast < LP_COLD_READS;
}

void lp_cold_read(struct lp_cold *c, uint64_t now, uint64_t ns, uint64_t nr_pages)
{
	if (ns > SLOW_NS + nr_pages * SLOW_PAGE_NS) {
		*c = (struct lp_cold){0};
	} else if (++c->fast == LP_COLD_READS) {
		c->pause = !c->pause ? PAUSE_MIN : c->pause < PAUSE_MAX / 2 ? c->pause * 2 : PAUSE_MAX;
		c->not_before = now + c->pause;
	}
}

void lp_cold_waited(struct lp_cold *c, uint64_t now, uint64_t ns)
{
	if (ns > LONG_WAIT_NS && now >= c->not_before && !lp_cold_expected(c))
		c->fast = LP_COLD_READS - LP_COLD_TRIES;
}
