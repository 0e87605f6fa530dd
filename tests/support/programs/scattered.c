/*
 * Much memory, of which little is written: `scattered MIB EACH`.
 *
 * SIGUSR1 is the next step: it writes EACH pages, all over the memory, and says "step n". SIGUSR2 checks every page and
 * says "right" or "wrong".
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define WORDS 512

static void stamp(uint64_t *page, uint64_t index, uint64_t step)
{
	for (uint64_t word = 0; word < WORDS; word++)
		page[word] = (index * 1000003 + word) * 31 + step;
}

static int stamped(const uint64_t *page, uint64_t index, uint64_t step)
{
	for (uint64_t word = 0; word < WORDS; word++)
		if (page[word] != (index * 1000003 + word) * 31 + step)
			return 0;
	return 1;
}

/* The step in which a page was written last: step n writes the pages n, n + apart, n + 2 * apart, ... */
static uint64_t last(uint64_t index, uint64_t apart, uint64_t step)
{
	return index % apart && index % apart <= step ? index % apart : 0;
}

int main(int argc, char **argv)
{
	uint64_t pages, each, apart, step = 0, *memory;
	sigset_t set;
	int signo;

	if (argc != 3)
		return 2;
	pages = strtoull(argv[1], NULL, 10) << 8;
	each = strtoull(argv[2], NULL, 10);
	apart = pages / each;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	madvise(memory, pages << 12, MADV_HUGEPAGE); /* what is written is a page all the same */
	for (uint64_t index = 0; index < pages; index++)
		stamp(memory + index * WORDS, index, 0);
	printf("ready\n");
	fflush(stdout);
	while (!sigwait(&set, &signo)) {
		if (signo == SIGUSR1) {
			step++;
			for (uint64_t index = step; index < pages; index += apart)
				stamp(memory + index * WORDS, index, step);
			printf("step %llu\n", (unsigned long long)step);
		} else {
			int right = 1;

			for (uint64_t index = 0; index < pages; index++)
				right = right && stamped(memory + index * WORDS, index, last(index, apart, step));
			printf("%s\n", right ? "right" : "wrong");
		}
		fflush(stdout);
	}
	return 1;
}
