#include "readahead.h"

#include <string.h>

#define SURE 4 /* pages of a window: so many make a stream */

void lp_readahead_init(struct lp_readahead *plan, uint64_t max_window)
{
	memset(plan, 0, sizeof(*plan));
	plan->max_window = max_window ? max_window : 1;
}

struct lp_window lp_readahead_fault(struct lp_readahead *plan, uint64_t page)
{
	struct lp_stream *oldest = &plan->streams[0];
	struct lp_window window = {page, 1};

	plan->clock++;
	for (int i = 0; i < LP_STREAMS; i++) {
		struct lp_stream *s = &plan->streams[i];

		/* a stream that has begun may skip what is there already */
		uint64_t skip = s->window >= SURE ? s->window : 0;

		if (s->window && (page - s->up <= skip || s->down - page <= skip)) {
			uint64_t nr = s->window * 2 < plan->max_window ? s->window * 2 : plan->max_window;

			s->used = plan->clock;
			s->window = nr;
			window.nr = nr;
			if (page - s->up <= skip) {
				s->up = page + nr;
			} else {
				window.nr = nr <= page ? nr : page + 1;
				window.first = page - (window.nr - 1);
				s->down = window.first - 1;
			}
			return window;
		}
		if (s->used < oldest->used)
			oldest = s;
	}
	*oldest = (struct lp_stream){.up = page + 1, .down = page - 1, .window = 1, .used = plan->clock};
	return window;
}
