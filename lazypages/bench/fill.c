/*
 * Writes pages files: fill FILE [ORDER] <RUNS
 *
 * A line of RUNS, "at tag page nr step", stands for nr adjacent pages of the
 * file, from page `at` on: page, page + step, ... of tag.  ORDER is an array
 * of uint32_t, the order of a chase through the pages: word 0 of each page is
 * then the number of the next one.  Pages in no run are holes.
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BATCH 256

static uint32_t *next;
static uint64_t nr_next;

static void read_order(const char *path)
{
	uint32_t page, first, before;
	FILE *file = fopen(path, "re");
	uint64_t nr = 0;

	if (!file)
		die("%s", path);
	for (before = first = 0; fread(&page, sizeof(page), 1, file) == 1; before = page, nr++) {
		if (page >= nr_next) {
			next = realloc(next, (page + 1) * 2ull * sizeof(*next));
			if (!next)
				die("out of memory");
			memset(next + nr_next, 0xff, ((page + 1) * 2ull - nr_next) * sizeof(*next));
			nr_next = (page + 1) * 2ull;
		}
		if (nr)
			next[before] = page;
		else
			first = page;
	}
	if (nr)
		next[before] = first;
	fclose(file);
}

int main(int argc, char **argv)
{
	uint64_t *buffer = aligned_alloc(PAGE, BATCH * PAGE);
	unsigned long long at, tag, page, nr, step;
	int fd;

	if (argc < 2 || argc > 3 || !buffer)
		die("usage: fill FILE [ORDER] <RUNS");
	if (argc == 3)
		read_order(argv[2]);
	fd = open(argv[1], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		die("%s", argv[1]);
	while (scanf("%llu %llu %llu %llu %llu", &at, &tag, &page, &nr, &step) == 5) {
		while (nr) {
			uint64_t batch = nr < BATCH ? nr : BATCH;

			for (uint64_t i = 0; i < batch; i++, page += step) {
				for (uint64_t w = 0; w < WORDS; w++)
					buffer[i * WORDS + w] = word_of(tag, page, w);
				if (page < nr_next)
					buffer[i * WORDS] = next[page];
			}
			if (pwrite(fd, buffer, batch * PAGE, (off_t)(at * PAGE)) != (ssize_t)(batch * PAGE))
				die("%s", argv[1]);
			at += batch;
			nr -= batch;
		}
	}
	if (close(fd))
		die("%s", argv[1]);
	return 0;
}
