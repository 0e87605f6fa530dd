#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t seed;
static enum { FORWARD, REVERSE, RANDOM } order;
static char ready_path[512], go_path[512], verdict_path[512];

/* One write per line, so that lines of several tasks never mix. */
static void say(const char *line, int length)
{
	int fd = open(verdict_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	if (fd < 0 || write(fd, line, length) != length)
		_exit(3);
	close(fd);
}

_Noreturn void die(const char *what)
{
	char line[512];

	say(line, snprintf(line, sizeof line, "{\"name\": \"died\", \"pid\": %d, \"data\": 0, \"zero\": 0, \"bad\": 1, "
			   "\"where\": \"\", \"what\": \"%s: %s\"}\n", getpid(), what, strerror(errno)));
	_exit(2);
}

void report(const struct tally *t)
{
	char line[512];

	say(line, snprintf(line, sizeof line, "{\"name\": \"%s\", \"pid\": %d, \"data\": %lu, \"zero\": %lu, \"bad\": %lu, "
			   "\"where\": \"%p\", \"what\": \"%s\"}\n", t->name, getpid(), t->data, t->zero, t->bad,
			   t->where, t->what ? t->what : ""));
}

/* Spreads every bit over all others. */
static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 31) * 0x7fb5d329728ea185u;
	x = (x ^ x >> 27) * 0x81dadef4bc2dd44du;
	return x ^ x >> 33;
}

static uint64_t key_of(struct region r, size_t page)
{
	return mix(seed + mix(r.id << 40 | (r.first + page))) | 1;
}

/* An odd number times an odd number: never zero, and different for every word of a page. */
static inline uint64_t word_of(uint64_t key, size_t word)
{
	return key * (2 * word + 1);
}

struct region region_map(size_t pages)
{
	static uint64_t last_id;
	struct region r = { .pages = pages, .id = ++last_id };

	r.at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (r.at == MAP_FAILED)
		die("mmap");
	return r;
}

struct region region_new(size_t pages)
{
	struct region r = region_map(pages);

	fill(r);
	return r;
}

struct region slice(struct region r, size_t from, size_t pages)
{
	return (struct region){ .at = r.at + from * PAGE, .pages = pages, .id = r.id, .first = r.first + from };
}

struct region moved(struct region r, void *to)
{
	r.at = to;
	return r;
}

void fill(struct region r)
{
	for (size_t page = 0; page < r.pages; page++) {
		uint64_t key = key_of(r, page), *words = (uint64_t *)(r.at + page * PAGE);

		for (size_t i = 0; i < WORDS; i++)
			words[i] = word_of(key, i);
	}
}

static void bad(struct tally *t, const volatile void *where, const char *what)
{
	if (!t->bad++) {
		t->where = (const void *)where;
		t->what = what;
	}
}

void expect_tagged(struct tally *t, struct region r, size_t page, size_t nr_words, uint64_t value)
{
	uint64_t key = key_of(r, page);
	const volatile uint64_t *words = (const volatile uint64_t *)(r.at + page * PAGE);

	for (size_t i = 0; i < WORDS; i++) {
		uint64_t got = words[i];

		if (got != (i < nr_words ? value : word_of(key, i))) {
			bad(t, &words[i], got ? "expected data, found other data" : "expected data, found zero");
			return;
		}
	}
	t->data++;
}

void expect_data(struct tally *t, struct region r, size_t page)
{
	expect_tagged(t, r, page, 0, 0);
}

void expect_data_or_zero(struct tally *t, struct region r, size_t page)
{
	uint64_t key = key_of(r, page);
	const volatile uint64_t *words = (const volatile uint64_t *)(r.at + page * PAGE);

	for (size_t i = 0; i < WORDS; i++) {
		uint64_t got = words[i];

		if (got && got != word_of(key, i)) {
			bad(t, &words[i], "expected data or zero, found other data");
			return;
		}
	}
	t->data++;
}

void expect_zero(struct tally *t, const void *page)
{
	const volatile uint64_t *words = page;

	for (size_t i = 0; i < WORDS; i++)
		if (words[i]) {
			bad(t, &words[i], "expected zero, found data");
			return;
		}
	t->zero++;
}

void expect(struct tally *t, bool condition, const char *what)
{
	if (!condition)
		bad(t, NULL, what);
}

void expect_exit(struct tally *t, pid_t pid, int code)
{
	int status;

	while (waitpid(pid, &status, 0) != pid)
		if (errno != EINTR)
			die("waitpid");
	expect(t, WIFEXITED(status) && WEXITSTATUS(status) == code, "a child ended otherwise than it should");
}

struct walk walk_over(size_t n, uint64_t salt)
{
	static _Atomic uint64_t nr_walks; /* no two walks of a task take the same way */
	struct walk w = { .n = n };

	while (w.mask + 1 < n)
		w.mask = w.mask << 1 | 1;
	w.state = mix(seed ^ mix(salt << 32 | nr_walks++)) & w.mask;
	return w;
}

bool walk_next(struct walk *w, size_t *index)
{
	if (w->done == w->n)
		return false;
	if (order == FORWARD) {
		*index = w->done;
	} else if (order == REVERSE) {
		*index = w->n - 1 - w->done;
	} else {
		/* a linear congruence of full period over a power of two; what is past n is left out */
		do
			w->state = (w->state * 1664525 + 1013904223) & w->mask;
		while (w->state >= w->n);
		*index = w->state;
	}
	w->done++;
	return true;
}

/* So that parent and child, which count their walks alike, go different ways. */
static uint64_t salt_of(const struct tally *t)
{
	uint64_t salt = 0;

	for (const char *c = t->name; *c; c++)
		salt = mix(salt ^ (unsigned char)*c);
	return salt;
}

void expect_region(struct tally *t, struct region r)
{
	size_t page;

	for (struct walk w = walk_over(r.pages, salt_of(t)); walk_next(&w, &page);)
		expect_data(t, r, page);
}

void expect_zeros(struct tally *t, const void *at, size_t pages)
{
	size_t page;

	for (struct walk w = walk_over(pages, salt_of(t)); walk_next(&w, &page);)
		expect_zero(t, (const unsigned char *)at + page * PAGE);
}

void ready(void)
{
	int fd = open(ready_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	if (fd < 0)
		die("ready");
	close(fd);
}

void wait_go(void)
{
	char word[16];
	int fd, n;

	while ((fd = open(go_path, O_RDONLY | O_CLOEXEC)) < 0)
		nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
	n = read(fd, word, sizeof word - 1);
	close(fd);
	if (n <= 0)
		die("go");
	word[n] = 0;
	order = !strcmp(word, "forward") ? FORWARD : !strcmp(word, "reverse") ? REVERSE : RANDOM;
}

int main(int argc, char **argv)
{
	const struct scenario *all[] = { read_scenarios, layout_scenarios, fork_scenarios, tree_scenarios, guard_scenarios };

	if (argc != 4)
		return 64;
	snprintf(ready_path, sizeof ready_path, "%s/ready", argv[2]);
	snprintf(go_path, sizeof go_path, "%s/go", argv[2]);
	snprintf(verdict_path, sizeof verdict_path, "%s/verdict", argv[2]);
	seed = strtoull(argv[3], NULL, 0);
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		for (const struct scenario *s = all[i]; s->name; s++)
			if (!strcmp(s->name, argv[1])) {
				s->run();
				return 0;
			}
	return 64;
}
