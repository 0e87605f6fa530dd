/*
 * What the programs of the bench have in common: what every page holds, the
 * clock, and how they give up.
 */
#ifndef LAZYPAGES_BENCH_COMMON_H
#define LAZYPAGES_BENCH_COMMON_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE 4096ull
#define WORDS (PAGE / sizeof(uint64_t))

/* In the current directory: a whole path may be too long for a socket. */
#define SOCKET "lazy-pages.socket"

/* "Restore finished" (docs/criu.md, "Control socket"). */
#define FINISH 0x52535446u

/* Word `at` of page `page` under tag `tag` (which task, which version of it): never twice the same, and never 0. */
static inline uint64_t word_of(uint64_t tag, uint64_t page, uint64_t at)
{
	/* odd, so that different inputs stay different; at least 1, so that it is not 0 */
	return (tag << 40 | page << 9 | at | 1ull << 63) * 0x9e3779b97f4a7c15ull;
}

static inline uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *format, ...)
{
	int error = errno;
	va_list args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	if (error)
		fprintf(stderr, ": %s", strerror(error));
	fputc('\n', stderr);
	_Exit(1);
}

static inline uint64_t number(const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end)
		die("not a number: %s", text);
	return value;
}

#endif
