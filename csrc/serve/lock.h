/*
 * A lock for one who rarely waits long and many who may share it: held for microseconds, so waiting is spinning at
 * first, and the one who wants it alone goes first.  Sleeping locks cost more here than what they guard: waking an idle
 * CPU takes tens of microseconds, a copy of some pages takes less.
 */
#ifndef LAZYPAGES_LOCK_H
#define LAZYPAGES_LOCK_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#define LP_ALONE 0x80000000u /* somebody holds it, or waits for it, alone; the rest counts who share it */
#define LP_SPINS 8000	     /* about 100 to 400 us */
#define LP_SPINS_ONE_CPU 100 /* whom we wait for needs this CPU */

/* How long to spin before sleeping; for all locks. */
static _Atomic unsigned lp_spins = LP_SPINS;

struct lp_lock {
	_Atomic unsigned state;
	pthread_mutex_t alone; /* one at a time */
};

static inline void lp_lock_init(struct lp_lock *lock)
{
	atomic_init(&lock->state, 0);
	pthread_mutex_init(&lock->alone, NULL);
}

static inline void lp_lock_destroy(struct lp_lock *lock)
{
	pthread_mutex_destroy(&lock->alone);
}

static inline void lp_lock_wait(unsigned *spins)
{
	/* whom we wait for may need this CPU */
	const struct timespec pause = {.tv_nsec = 20000};

	if (++*spins > atomic_load_explicit(&lp_spins, memory_order_relaxed))
		nanosleep(&pause, NULL);
#if defined(__x86_64__) || defined(__i386__)
	else
		__builtin_ia32_pause();
#endif
}

static inline void lp_lock_alone(struct lp_lock *lock)
{
	unsigned spins = 0;

	pthread_mutex_lock(&lock->alone);
	atomic_fetch_or(&lock->state, LP_ALONE);
	while (atomic_load(&lock->state) != LP_ALONE)
		lp_lock_wait(&spins);
}

static inline void lp_unlock_alone(struct lp_lock *lock)
{
	atomic_fetch_and(&lock->state, ~LP_ALONE);
	pthread_mutex_unlock(&lock->alone);
}

/* From alone to shared, with nobody in between. */
static inline void lp_lock_downgrade(struct lp_lock *lock)
{
	atomic_store(&lock->state, 1);
	pthread_mutex_unlock(&lock->alone);
}

static inline void lp_lock_shared(struct lp_lock *lock)
{
	unsigned spins = 0;

	for (;;) {
		unsigned state = atomic_load(&lock->state);

		if (state & LP_ALONE)
			lp_lock_wait(&spins);
		else if (atomic_compare_exchange_weak(&lock->state, &state, state + 1))
			return;
	}
}

static inline void lp_unlock_shared(struct lp_lock *lock)
{
	atomic_fetch_sub(&lock->state, 1);
}

#endif
