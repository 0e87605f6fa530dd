#include "memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool within_levels(const struct lp_extent *e, const struct lp_level *levels, uint32_t nr_levels)
{
	uint64_t size;

	if (!e->lazy || e->source == LP_SOURCE_REMOTE || e->source == LP_SOURCE_LOST)
		return true;
	if (e->source >= nr_levels)
		return false;
	size = levels[e->source].size;
	return e->offset <= size && e->nr_pages <= (size - e->offset) >> LP_PAGE_SHIFT;
}

struct lp_memory *lp_memory_new(const struct lp_extent *extents, size_t nr_extents, const struct lp_range *vmas,
				size_t nr_vmas, const struct lp_range *wiped, size_t nr_wiped,
				const struct lp_level *levels, uint32_t nr_levels)
{
	struct lp_memory *m = calloc(1, sizeof(*m));

	if (!m)
		return NULL;
	m->nr_levels = nr_levels;
	m->levels = calloc(nr_levels + 1, sizeof(*m->levels));
	for (size_t i = 0; m->levels && i < nr_extents; i++) {
		m->remote |= extents[i].lazy && extents[i].source == LP_SOURCE_REMOTE;
		if (!within_levels(&extents[i], levels, nr_levels)) {
			lp_memory_free(m);
			errno = EINVAL;
			return NULL;
		}
	}
	if (m->levels)
		m->space = lp_space_new(extents, nr_extents, vmas, nr_vmas, wiped, nr_wiped);
	if (!m->space) {
		lp_memory_free(m);
		return NULL;
	}
	if (nr_levels)
		memcpy(m->levels, levels, nr_levels * sizeof(*levels));
	if (m->remote)
		lp_space_index(m->space);
	return m;
}

void lp_memory_free(struct lp_memory *m)
{
	int saved = errno;

	if (!m)
		return;
	lp_space_free(m->space);
	free(m->levels);
	free(m);
	errno = saved;
}
