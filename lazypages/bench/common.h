/*
 * What the programs of the bench share: the contents of pages, the clock, and
 * error exits.
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

/* Relative to the current directory: a whole path may exceed sun_path (unix(7)). */
#define SOCKET "lazy-pages.socket"

/* "Restore finished" (docs/criu.md, "Control socket"). */
#define FINISH 0x52535446u

/* Word `at` of page `page` with tag `tag` (task and version of its memory): unique, and never 0. */
static inline uint64_t word_of(uint64_t tag, uint64_t page, uint64_t at)
{
	/* an odd factor, so that different inputs have different results; the highest bit, so that none is 0 */
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
