#include "stats.h"

#include <stdlib.h>
#include <string.h>

#include "task_trace.h"

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t exponent, bucket;

	if (ns < 8)
		return (uint32_t)ns;
	exponent = 63 - (uint32_t)__builtin_clzll(ns);
	bucket = (exponent - 2) * 8 + ((ns >> (exponent - 3)) & 7);
	return bucket < LP_HISTOGRAM_BUCKETS ? bucket : LP_HISTOGRAM_BUCKETS - 1;
}

uint64_t lp_histogram_bound(uint32_t bucket)
{
	uint32_t exponent = bucket / 8 + 2;

	if (bucket < 8)
		return bucket;
	return ((8 + (uint64_t)(bucket % 8) + 1) << (exponent - 3)) - 1;
}

uint64_t lp_count_answered(struct lp_task *t, uint64_t since, uint32_t times, uint16_t source, uint64_t addr, uint64_t pages)
{
	uint64_t now = lp_now_ns(), ns = now - since, max = atomic_load(&t->stats.service_max);

	if (t->engine->trace)
		lp_task_trace_at(t, now, LP_TRACE_ANSWERED, source, addr, pages, ns, times);
	atomic_fetch_add_explicit(&t->histogram[bucket_of(ns)], times, memory_order_relaxed);
	while (ns > max && !atomic_compare_exchange_weak(&t->stats.service_max, &max, ns))
		;
	return ns;
}

uint32_t lp_source_index(const struct lp_task *t, uint32_t source)
{
	if (source == LP_SOURCE_REMOTE)
		return t->nr_levels;
	return source == LP_SOURCE_LOST ? t->nr_levels + 1 : source;
}

void lp_begin_wait(struct lp_task *t, struct lp_waiter waiter)
{
	pthread_mutex_lock(&t->waiting_lock);
	if (t->nr_waiting == t->cap_waiting) {
		size_t cap = t->cap_waiting ? t->cap_waiting * 2 : 16;
		struct lp_waiter *more = realloc(t->waiting, cap * sizeof(*more));

		if (!more) { /* only for the statistics */
			pthread_mutex_unlock(&t->waiting_lock);
			return;
		}
		t->waiting = more;
		t->cap_waiting = cap;
	}
	t->waiting[t->nr_waiting++] = waiter;
	pthread_mutex_unlock(&t->waiting_lock);
}

void lp_end_wait(struct lp_task *t, uint64_t dump_addr, uint64_t end, bool served)
{
	pthread_mutex_lock(&t->waiting_lock);
	for (size_t i = 0; i < t->nr_waiting;) {
		struct lp_waiter w = t->waiting[i];

		if (w.dump_addr < dump_addr || w.dump_addr >= end) {
			i++;
			continue;
		}
		t->waiting[i] = t->waiting[--t->nr_waiting];
		if (served) {
			lp_count(&t->stats.faults_served, 1);
			lp_count(&t->served[t->nr_levels], 1);
			lp_count_answered(t, w.since, 1, LP_TRACE_REMOTE, w.addr, w.nr_pages);
		}
	}
	pthread_mutex_unlock(&t->waiting_lock);
}

void lp_count_dropped(struct lp_task *t, const uint64_t *dropped)
{
	for (uint32_t i = 0; i < t->nr_levels + 2; i++)
		lp_count(&t->dropped[i], dropped[i]);
}

void lp_drop_pages(struct lp_task *t, const struct lp_run *run, uint64_t skip, uint64_t nr)
{
	lp_count(&t->dropped[lp_source_index(t, run->source)], lp_space_commit(t->space, run->index + skip, nr));
}

size_t lp_nr_waiting(struct lp_task *t)
{
	size_t nr;

	pthread_mutex_lock(&t->waiting_lock);
	nr = t->nr_waiting;
	pthread_mutex_unlock(&t->waiting_lock);
	return nr;
}

uint64_t lp_task_tag(const struct lp_task *t)
{
	return t->tag;
}

uint32_t lp_task_nr_levels(const struct lp_task *t)
{
	return t->nr_levels;
}

uint64_t lp_task_total(const struct lp_task *t)
{
	return t->total;
}

uint64_t lp_task_pending(const struct lp_task *t)
{
	return lp_space_pending(t->space);
}

bool lp_task_complete(const struct lp_task *t)
{
	return atomic_load(&t->complete);
}

uint64_t lp_task_lost(const struct lp_task *t)
{
	return lp_space_lost(t->space);
}

void lp_task_stats(const struct lp_task *t, struct lp_stats *stats)
{
#define GET(name) stats->name = atomic_load_explicit(&t->stats.name, memory_order_relaxed)
	GET(faults);
	GET(faults_zero);
	GET(faults_served);
	GET(retried);
	GET(zero_pages);
	GET(present);
	GET(copies);
	GET(reads);
	GET(wakes);
	GET(poisoned);
	GET(forks);
	GET(remaps);
	GET(removes);
	GET(unmaps);
	GET(service_max);
#undef GET
}

void lp_task_sources(const struct lp_task *t, uint64_t *copied, uint64_t *dropped, uint64_t *faults)
{
	for (uint32_t i = 0; i < t->nr_levels + 2; i++) {
		copied[i] = atomic_load_explicit(&t->copied[i], memory_order_relaxed);
		dropped[i] = atomic_load_explicit(&t->dropped[i], memory_order_relaxed);
		faults[i] = atomic_load_explicit(&t->served[i], memory_order_relaxed);
	}
}

void lp_task_remaining(struct lp_task *t, uint64_t *by_source)
{
	struct lp_counts counts = {by_source, t->nr_levels};

	memset(by_source, 0, (t->nr_levels + 2) * sizeof(*by_source));
	lp_lock_shared(&t->lock);
	lp_space_count(t->space, &counts);
	lp_unlock_shared(&t->lock);
}

void lp_task_histogram(const struct lp_task *t, uint64_t buckets[LP_HISTOGRAM_BUCKETS])
{
	for (uint32_t i = 0; i < LP_HISTOGRAM_BUCKETS; i++)
		buckets[i] = atomic_load_explicit(&t->histogram[i], memory_order_relaxed);
}

const struct lp_space *lp_task_space(const struct lp_task *t)
{
	return t->space;
}
