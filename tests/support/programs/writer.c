/*
 * Writes known pages on request: each SIGUSR1 is the next step, SIGUSR2 checks every byte and ends.
 *
 * Step n (1, 2, ...) writes page i of the table when i % (n + 1) == 0 and i < n * 500. The layout part maps, unmaps,
 * moves, replaces and discards memory as well. Prints the table's address, then "step n" or "right"/"wrong".
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096
#define PAGES 4096
#define AREA 64 /* pages of each area of the layout part */

static uint64_t *table, *areas[4];
static unsigned stamps[PAGES];

static void *map(void *at, int pages)
{
	void *made = mmap(at, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);

	if (made == MAP_FAILED)
		abort();
	return made;
}

static void stamp(uint64_t *page, uint64_t index, uint64_t step)
{
	for (uint64_t word = 0; word < PAGE / 8; word++)
		page[word] = (index * 1000003 + word) * 31 + step;
}

static int stamped(const uint64_t *page, uint64_t index, uint64_t step)
{
	for (uint64_t word = 0; word < PAGE / 8; word++)
		if (page[word] != (index * 1000003 + word) * 31 + step)
			return 0;
	return 1;
}

static void fill(uint64_t *area, uint64_t id)
{
	for (int i = 0; i < AREA; i++)
		stamp(area + i * PAGE / 8, i, id);
}

static int filled(const uint64_t *area, uint64_t id)
{
	for (int i = 0; i < AREA; i++)
		if (!stamped(area + i * PAGE / 8, i, id))
			return 0;
	return 1;
}

static int zeroed(const uint64_t *area, int pages)
{
	for (int i = 0; i < pages * PAGE / 8; i++)
		if (area[i])
			return 0;
	return 1;
}

/* areas[0]: replaced by a new mapping at the same address; [1]: moved; [2]: discarded; [3]: new at step 2. */
static void change_layout(unsigned step)
{
	if (step == 1) {
		map(areas[0], AREA);
		fill(areas[0], 100);
	} else if (step == 2) {
		void *to = map(NULL, AREA);

		areas[1] = mremap(areas[1], AREA * PAGE, AREA * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		madvise(areas[2], AREA * PAGE, MADV_DONTNEED);
		areas[3] = map(NULL, AREA);
		fill(areas[3], 103);
	} else if (step == 3) {
		/* What is mapped now where areas[1] was before shows nothing of it. */
		stamp(areas[2], 0, 102);
		mprotect(areas[3], AREA * PAGE, PROT_NONE);
	}
}

static int layout_right(unsigned step)
{
	int right = filled(areas[1], 1);

	right = right && (step >= 1 ? filled(areas[0], 100) : filled(areas[0], 0));
	if (step >= 3) {
		mprotect(areas[3], AREA * PAGE, PROT_READ);
		right = right && stamped(areas[2], 0, 102) && zeroed(areas[2] + PAGE / 8, AREA - 1);
	} else if (step == 2) {
		right = right && zeroed(areas[2], AREA);
	} else {
		right = right && filled(areas[2], 2);
	}
	return right && (step < 2 || filled(areas[3], 103));
}

int main(void)
{
	unsigned step = 0;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	table = map(NULL, PAGES);
	for (int i = 0; i < PAGES; i++)
		stamp(table + (size_t)i * PAGE / 8, i, 0);
	for (int i = 0; i < 3; i++) {
		areas[i] = map(NULL, AREA);
		fill(areas[i], i);
	}
	printf("%p\n", (void *)table);
	fflush(stdout);
	for (;;) {
		int signo, right = 1;

		if (sigwait(&set, &signo))
			abort();
		if (signo == SIGUSR1) {
			step++;
			for (unsigned i = 0; i < PAGES && i < step * 500; i += step + 1) {
				stamp(table + (size_t)i * PAGE / 8, i, step);
				stamps[i] = step;
			}
			change_layout(step);
			printf("step %u\n", step);
			fflush(stdout);
			continue;
		}
		for (int i = 0; i < PAGES; i++)
			right = right && stamped(table + (size_t)i * PAGE / 8, i, stamps[i]);
		printf("%s %s\n", right ? "right" : "wrong", layout_right(step) ? "right" : "wrong");
		return 0;
	}
}
