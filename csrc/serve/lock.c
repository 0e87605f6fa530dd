#include "lock.h"

#include <time.h>

_Atomic unsigned lp_spins = LP_SPINS;

void lp_lock_wait(unsigned *spins)
{
	/* the thread that holds the lock may need this CPU */
	const struct timespec pause = {.tv_nsec = 20000};

	if (++*spins > atomic_load_explicit(&lp_spins, memory_order_relaxed))
		nanosleep(&pause, NULL);
#if defined(__x86_64__) || defined(__i386__)
	else
		__builtin_ia32_pause();
#endif
}
