/* An eventfd by which one thread wakes another. */
#ifndef LAZYPAGES_WAKEUP_FD_H
#define LAZYPAGES_WAKEUP_FD_H

#include <stdint.h>
#include <unistd.h>

static inline void lp_wakeup(int fd)
{
	uint64_t one = 1;
	ssize_t rc = write(fd, &one, sizeof(one)); /* fails only when 2^64-2 wake-ups have not been read */

	(void)rc;
}

static inline void lp_wakeup_clear(int fd)
{
	uint64_t count;
	ssize_t rc = read(fd, &count, sizeof(count));

	(void)rc;
}

#endif
