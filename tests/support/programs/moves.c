/*
 * Changes its private memory in every way that tracking of writes can miss, and checks every byte of it.
 *
 * SIGUSR1: the next step; SIGUSR2: checks all. A page has a stamp in each of its words, or is zero; which one is kept in a
 * table for each area. In step 1 it forks a child, which then does the same on its own. Prints "ready PID", "step N PID",
 * "checked PID N wrong".
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define TABLE 512 /* pages that one page table maps */
#define MOST (2 * TABLE)
#define PLACE(n) ((char *)0x100000000000 + ((uint64_t)(n) << 32))

enum { WRITTEN, READ_AGAIN, HUGE, SMALL, SMALL_GOAL, TABLES, TABLES_GOAL, HUGE_GOAL, ANEW, MOVED_AWAY, AWAY, UNTOUCHED,
       GROWN, ZERO_DEVICE, OF_FILE, MERGED, RETURNED, AREAS };

static struct area {
	char *at;
	unsigned pages;
	uint32_t stamps[MOST]; /* 0: zero */
} areas[AREAS];

static int out;
static unsigned step;
static uint32_t last_stamp;

static void say(const char *format, ...)
{
	char line[256];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (write(out, line, (size_t)n) != n)
		_exit(3);
}

static void must(int ok, const char *what)
{
	if (!ok) {
		say("failed: %s\n", what);
		_exit(3);
	}
}

static void map(struct area *area, char *at, unsigned pages, int prot)
{
	must(mmap(at, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at, "mmap");
	if (area) {
		area->at = at;
		area->pages = pages;
		memset(area->stamps, 0, sizeof(area->stamps));
	}
}

static void stamp(struct area *area, unsigned first, unsigned count)
{
	for (unsigned page = first; page < first + count; page++) {
		volatile uint64_t *words = (uint64_t *)(area->at + page * PAGE);

		area->stamps[page] = ++last_stamp;
		for (uint64_t word = 0; word < PAGE / 8; word++)
			words[word] = (uint64_t)last_stamp << 32 | word;
	}
}

static void discard(struct area *area, unsigned first, unsigned count, int read)
{
	must(madvise(area->at + first * PAGE, count * PAGE, MADV_DONTNEED) == 0, "madvise");
	memset(area->stamps + first, 0, count * sizeof(*area->stamps));
	for (unsigned page = first; read && page < first + count; page += (unsigned)read)
		(void)*(volatile char *)(area->at + page * PAGE);
}

static void move(struct area *from, struct area *to, char *place)
{
	unsigned pages = from->pages;

	must(mremap(from->at, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place, "mremap");
	to->at = place;
	to->pages = pages;
	memmove(to->stamps, from->stamps, sizeof(to->stamps));
	if (to != from)
		from->pages = 0;
}

static unsigned check(int number)
{
	struct area *area = areas + number;
	unsigned wrong = 0;

	for (unsigned page = 0; page < area->pages; page++) {
		const volatile uint64_t *words = (uint64_t *)(area->at + page * PAGE);
		uint64_t stamp = area->stamps[page];

		for (uint64_t word = 0; word < PAGE / 8; word++)
			if (words[word] != (stamp ? stamp << 32 | word : 0)) {
				if (!wrong++)
					say("pid %d: area %d page %u has %#lx, not stamp %#lx\n", getpid(), number, page,
					    words[word] >> 32, stamp);
				break;
			}
	}
	return wrong;
}

static void start(int file, int zero)
{
	static const unsigned big[] = { HUGE, TABLES, TABLES_GOAL, HUGE_GOAL, MOVED_AWAY, RETURNED };

	for (int number = 0; number < AREAS; number++)
		map(areas + number, PLACE(number), 16, PROT_READ | PROT_WRITE);
	map(areas + WRITTEN, PLACE(WRITTEN), 256, PROT_READ | PROT_WRITE);
	for (unsigned i = 0; i < sizeof(big) / sizeof(*big); i++) {
		map(areas + big[i], PLACE(big[i]), MOST, PROT_READ | PROT_WRITE);
		madvise(PLACE(big[i]), MOST * PAGE, big[i] == HUGE || big[i] == HUGE_GOAL ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	}
	for (int number = 0; number < AREAS; number++)
		if (number == ZERO_DEVICE || number == OF_FILE)
			must(mmap(PLACE(number), 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
				  number == OF_FILE ? file : zero, 0) == PLACE(number), "mmap of a file");
	for (int number = 0; number < AREAS; number++)
		stamp(areas + number, 0, number == SMALL ? 8 : areas[number].pages);
	areas[AWAY].pages = 0;
}

static void first_changes(void)
{
	struct area small = areas[SMALL], huge = areas[HUGE];

	discard(areas + READ_AGAIN, 0, 16, 1);
	discard(areas + UNTOUCHED, 0, 16, 0);
	discard(areas + ZERO_DEVICE, 0, 8, 1);
	discard(areas + OF_FILE, 0, 8, 1); /* the file is zeros */
	move(areas + SMALL, areas + SMALL_GOAL, PLACE(SMALL_GOAL));
	move(areas + TABLES, areas + TABLES_GOAL, PLACE(TABLES_GOAL));
	discard(areas + HUGE, 0, TABLE, TABLE);
	move(areas + HUGE, areas + HUGE_GOAL, PLACE(HUGE_GOAL));
	map(areas + HUGE, huge.at, huge.pages, PROT_READ | PROT_WRITE);
	map(areas + SMALL, small.at, small.pages, PROT_READ | PROT_WRITE);
	(void)*(volatile char *)(small.at + 3 * PAGE);
	map(areas + ANEW, PLACE(ANEW), 16, PROT_READ | PROT_WRITE);
	stamp(areas + ANEW, 0, 8);
	/* What is at the old place now has nothing of it. */
	move(areas + MOVED_AWAY, areas + AWAY, PLACE(AWAY));
	map(areas + MOVED_AWAY, PLACE(MOVED_AWAY), MOST, PROT_READ | PROT_WRITE);
	stamp(areas + MOVED_AWAY, 0, 1);
	/* Away, and back to where something else was meanwhile. */
	move(areas + RETURNED, areas + RETURNED, PLACE(AREAS));
	move(areas + RETURNED, areas + RETURNED, PLACE(RETURNED));
	/* A new mapping that becomes one with its neighbour. */
	map(NULL, areas[MERGED].at + 16 * PAGE, 16, PROT_NONE);
	must(mprotect(areas[MERGED].at + 16 * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	areas[MERGED].pages = 32;
	stamp(areas + MERGED, 16, 8);
	must(mremap(areas[GROWN].at, 16 * PAGE, 32 * PAGE, 0) == areas[GROWN].at, "mremap");
	areas[GROWN].pages = 32;
	stamp(areas + GROWN, 20, 4);
}

static void second_changes(void)
{
	/* Onto a place whose pages the level before has as well. */
	map(areas + TABLES, PLACE(TABLES), MOST, PROT_READ | PROT_WRITE);
	madvise(PLACE(TABLES), MOST * PAGE, MADV_NOHUGEPAGE);
	move(areas + AWAY, areas + TABLES_GOAL, PLACE(TABLES_GOAL));
	discard(areas + HUGE_GOAL, TABLE, TABLE, TABLE);
	stamp(areas + OF_FILE, 2, 2);
	stamp(areas + READ_AGAIN, 3, 1);
}

static void next_step(void)
{
	step++;
	for (unsigned page = 0; page < 256; page += 2 + step)
		stamp(areas + WRITTEN, page, 1);
	if (step == 1) {
		first_changes();
		if (fork() == 0)
			stamp(areas + WRITTEN, 100, 20);
	} else if (step == 2) {
		second_changes();
	}
	say("step %u %d\n", step, getpid());
}

int main(int argc, char **argv)
{
	int file, zero, number;
	sigset_t set;

	if (argc < 3)
		return 2;
	for (int fd = 3; fd < 1024; fd++)
		close(fd);
	out = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0644);
	file = open(argv[2], O_RDONLY);
	zero = open("/dev/zero", O_RDONLY);
	if (out < 0 || file < 0 || zero < 0)
		return 2;
	start(file, zero);
	close(file);
	close(zero);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	say("ready %d\n", getpid());
	for (;;) {
		unsigned wrong = 0;

		sigwait(&set, &number);
		if (number == SIGUSR1) {
			next_step();
			continue;
		}
		for (int area = 0; area < AREAS; area++)
			wrong += check(area);
		say("checked %d %u wrong\n", getpid(), wrong);
	}
}
