/*
 * Writer-preferring reader/writer lock.  Critical sections last microseconds, so waiters spin before they sleep: waking an idle
 * CPU takes tens of microseconds, copying some pages takes less.
 */
#ifndef LAZYPAGES_LOCK_H
#define LAZYPAGES_LOCK_H

#include <pthread.h>
#include <stdatomic.h>

#define LP_ALONE 0x80000000u /* a writer holds the lock or waits for it; the other bits count the readers */
#define LP_SPINS 8000	     /* about 100 to 400 us */
#define LP_SPINS_ONE_CPU 100 /* with one CPU, the thread that holds the lock can't run while we spin */

/* How long to spin before sleeping; for all locks. */
extern _Atomic unsigned lp_spins;

struct lp_lock {
	_Atomic unsigned state;
	pthread_mutex_t alone; /* writers take it first */
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

/* Spins, or sleeps once it has spun for long. */
void lp_lock_wait(unsigned *spins);

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

/* From alone to shared; no other writer gets in between. */
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
