#include "deferred_pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/page.h"

#define DEFERRED_MOST ((size_t)4 << 20) /* bytes of deferred pages; above, the channels stop receiving */

const char *lp_zero_pages;

struct lp_deferred_pages {
	struct lp_deferred_pages *next;
	uint64_t tag, dump_addr, nr_pages;
	bool zeros; /* no bytes */
	_Alignas(16) char bytes[];
};

bool lp_make_zero_pages(void)
{
	if (!lp_zero_pages) {
		void *zeros = mmap(NULL, LP_ZERO_PAGES << LP_PAGE_SHIFT, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		lp_zero_pages = zeros == MAP_FAILED ? NULL : zeros;
	}
	return lp_zero_pages;
}

int lp_defer_pages(struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t nr_pages, const char *bytes)
{
	size_t size = bytes == lp_zero_pages ? 0 : nr_pages << LP_PAGE_SHIFT;
	struct lp_deferred_pages *p = NULL;

	if (channels->deferred_bytes + sizeof(*p) + size <= DEFERRED_MOST)
		p = malloc(sizeof(*p) + size);
	if (!p)
		return -EAGAIN;
	*p = (struct lp_deferred_pages){.tag = tag, .dump_addr = dump_addr, .nr_pages = nr_pages, .zeros = !size};
	memcpy(p->bytes, bytes, size);
	channels->deferred_bytes += sizeof(*p) + size;
	*channels->last_deferred = p;
	channels->last_deferred = &p->next;
	return 0;
}

static void drop_deferred(struct lp_channels *channels, struct lp_deferred_pages **link)
{
	struct lp_deferred_pages *p = *link;

	*link = p->next;
	if (!p->next)
		channels->last_deferred = link;
	channels->deferred_bytes -= sizeof(*p) + (p->zeros ? 0 : p->nr_pages << LP_PAGE_SHIFT);
	free(p);
}

void lp_place_deferred_pages(struct lp_channels *channels)
{
	const struct lp_deferred_pages *refused = NULL;
	struct lp_deferred_pages **link = &channels->deferred, *p;

	while ((p = *link)) {
		if ((refused && refused->tag == p->tag) ||
		    channels->tasks.place(channels->tasks.arg, p->tag, p->dump_addr, p->nr_pages, p->zeros ? lp_zero_pages : p->bytes)) {
			refused = p; /* the other pages of that task are not tried */
			link = &p->next;
		} else {
			drop_deferred(channels, link);
		}
	}
}

bool lp_pages_are_deferred(const struct lp_channels *channels, uint64_t tag, uint64_t dump_addr, uint64_t *end)
{
	for (const struct lp_deferred_pages *p = channels->deferred; p; p = p->next) {
		uint64_t until = p->dump_addr + (p->nr_pages << LP_PAGE_SHIFT);

		if (p->tag != tag || until <= dump_addr || p->dump_addr >= *end)
			continue;
		if (p->dump_addr <= dump_addr && until < *end)
			*end = until;
		if (p->dump_addr <= dump_addr)
			return true;
		*end = p->dump_addr;
	}
	return false;
}

void lp_drop_deferred_pages(struct lp_channels *channels)
{
	while (channels->deferred)
		drop_deferred(channels, &channels->deferred);
}
