/* What malloc, calloc and realloc are in the engine that tests/support/failing_memory.py builds: they fail when told to. */
#undef malloc
#undef calloc
#undef realloc

#include <stdatomic.h>
#include <stddef.h>

void *malloc(size_t size);
void *calloc(size_t nr, size_t size);
void *realloc(void *old, size_t size);

/* So many succeed, then so many fail, then all succeed; how many have failed since. */
static _Atomic long good = -1, bad;
static _Atomic long failed;

void failing_memory(long after, long times)
{
	atomic_store(&bad, 0);
	atomic_store(&failed, 0);
	atomic_store(&good, after);
	atomic_store(&bad, times);
}

long failed_memory(void)
{
	return atomic_load(&failed);
}

static int fails(void)
{
	if (atomic_load(&bad) <= 0 || atomic_fetch_sub(&good, 1) > 0)
		return 0;
	if (atomic_fetch_sub(&bad, 1) <= 0)
		return 0;
	atomic_fetch_add(&failed, 1);
	return 1;
}

void *failing_malloc(size_t size)
{
	return fails() ? NULL : malloc(size);
}

void *failing_calloc(size_t nr, size_t size)
{
	return fails() ? NULL : calloc(nr, size);
}

void *failing_realloc(void *old, size_t size)
{
	return fails() ? NULL : realloc(old, size);
}
