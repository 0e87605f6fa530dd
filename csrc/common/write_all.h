/*
 * write(2) of a whole buffer.
 */
#ifndef LAZYPAGES_WRITE_ALL_H
#define LAZYPAGES_WRITE_ALL_H

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

/* Returns 0 or -errno; -ENOSPC if write(2) returns 0. */
static inline int lp_write_all(int fd, const void *data, size_t size)
{
	const char *at = data;

	while (size) {
		ssize_t put = write(fd, at, size);

		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return put < 0 ? -errno : -ENOSPC;
		at += put;
		size -= (size_t)put;
	}
	return 0;
}

#endif
