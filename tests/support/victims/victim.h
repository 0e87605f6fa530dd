/*
 * What the victims share: memory whose every page is unique and derived from
 * a seed, checks of it, and the way a victim talks to the harness.
 *
 * A victim is started as `victim SCENARIO DIRECTORY SEED`. It fills its
 * memory, makes the file DIRECTORY/ready and waits for DIRECTORY/go, which
 * names the order to touch pages in. Checkpoint and restore happen in between.
 * Then it checks, from inside, every byte of every page and appends its
 * findings to DIRECTORY/verdict. No file is open at the checkpoint.
 */
#ifndef LAZYPAGES_VICTIM_H
#define LAZYPAGES_VICTIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE ((size_t)4096)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)
#define PAGES(bytes) ((size_t)(bytes) / PAGE)

/* Private anonymous memory; its page i has the content (id, first + i). */
struct region {
	unsigned char *at;
	size_t pages;
	uint64_t id;
	size_t first;
};

/* What one checker saw. */
struct tally {
	const char *name;
	uint64_t data;       /* pages with the bytes they had at the checkpoint */
	uint64_t zero;       /* pages that had to be zero, and were */
	uint64_t bad;        /* pages that were anything else, and other disappointments */
	const void *where;   /* the first of them */
	const char *what;
};

/* Visits 0 .. n-1, each once, in the order the harness asked for. */
struct walk {
	size_t n, done, state, mask;
};

struct scenario {
	const char *name;
	void (*run)(void);
};
extern const struct scenario read_scenarios[], layout_scenarios[], fork_scenarios[], tree_scenarios[], guard_scenarios[];

/* Puts the reason into the verdict and exits 2. */
_Noreturn void die(const char *what);

/* Reserves memory without touching it. */
struct region region_map(size_t pages);
/* Reserves and fills it. */
struct region region_new(size_t pages);
/* A part of it, from page `from` on. */
struct region slice(struct region r, size_t from, size_t pages);
/* The same contents at another place. */
struct region moved(struct region r, void *to);
void fill(struct region r);

/* The single page p + offset of region r. */
void expect_data(struct tally *t, struct region r, size_t page);
/* As expect_data, but the words 0 .. nr_words-1 hold `value` instead. */
void expect_tagged(struct tally *t, struct region r, size_t page, size_t nr_words, uint64_t value);
/* Each word is the data's or zero: somebody gives the page up meanwhile. */
void expect_data_or_zero(struct tally *t, struct region r, size_t page);
void expect_zero(struct tally *t, const void *page);
/* A condition that is no page's content. */
void expect(struct tally *t, bool condition, const char *what);
/* Waits for a child and expects its exit code. */
void expect_exit(struct tally *t, pid_t pid, int code);

struct walk walk_over(size_t n, uint64_t salt);
bool walk_next(struct walk *w, size_t *index);

/* All pages of r, in the order asked for. */
void expect_region(struct tally *t, struct region r);
void expect_zeros(struct tally *t, const void *at, size_t pages);

/* Appends the tally to the verdict. */
void report(const struct tally *t);

/* Tells the harness to take the checkpoint; one task of a tree does that. */
void ready(void);
/* Waits for the harness's go; every task and thread may. */
void wait_go(void);

#endif
