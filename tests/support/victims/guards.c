/*
 * Tasks with guard regions (madvise(2), MADV_GUARD_INSTALL, Linux 6.13): pages that raise SIGSEGV, installed before the
 * checkpoint or after it.  A kernel without them says EINVAL; then all is as if nobody had asked.
 */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define INSTALL 102 /* linux/mman.h; older headers don't have them */
#define REMOVE 103

static bool no_guards; /* the kernel has none */
static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t may_escape;

static void on_segv(int number)
{
	if (!may_escape)
		_exit(100 + number);
	siglongjmp(escape, 1);
}

static void catch_segv(void)
{
	struct sigaction action = { .sa_handler = on_segv, .sa_flags = SA_NODEFER };

	if (sigaction(SIGSEGV, &action, NULL))
		die("sigaction");
}

static void guard(void *at, size_t pages, int advice)
{
	if (!madvise(at, pages * PAGE, advice))
		return;
	if (errno != EINVAL || (advice == REMOVE && !no_guards))
		die("madvise");
	no_guards = true;
}

static bool raises(const void *page)
{
	may_escape = 1;
	if (sigsetjmp(escape, 1)) {
		may_escape = 0;
		return true;
	}
	(void)*(const volatile char *)page;
	may_escape = 0;
	return false;
}

/* Counted as data: it is what the page has to be. */
static void expect_guard(struct tally *t, const void *page)
{
	if (raises(page))
		t->data++;
	else
		expect(t, false, "expected a guard, found a page");
}

/* What a page has to be. */
enum state { DATA, ZERO, GUARD };

static void expect_states(struct tally *t, struct region r, const char *states)
{
	size_t page;

	for (struct walk w = walk_over(r.pages, r.id); walk_next(&w, &page);) {
		if (states[page] == DATA)
			expect_data(t, r, page);
		else if (states[page] == ZERO)
			expect_zero(t, r.at + page * PAGE);
		else
			expect_guard(t, r.at + page * PAGE);
	}
}

/* Installs or removes, and says what is there then. */
static void change(struct region r, char *states, size_t from, size_t pages, int advice)
{
	guard(r.at + from * PAGE, pages, advice);
	if (no_guards)
		return;
	for (size_t i = from; i < from + pages; i++)
		if (advice == INSTALL)
			states[i] = GUARD;
		else if (states[i] == GUARD)
			states[i] = ZERO;
}

/* At the checkpoint: in memory with data and in memory never touched, in two mappings at once, removed again in part. */
static void guarded(void)
{
	size_t n = PAGES(4 * MIB), half = n / 2;
	struct region r = region_new(n), untouched = region_map(n);
	static char states[PAGES(4 * MIB)], empty[PAGES(4 * MIB)];
	struct tally t = { .name = "guarded" };
	struct region to;
	pid_t pid;

	catch_segv();
	memset(empty, ZERO, n);
	change(r, states, 0, 1, INSTALL);
	change(r, states, 10, 30, INSTALL);
	change(r, states, half - 12, 24, INSTALL);
	change(r, states, n - 4, 4, INSTALL);
	change(r, states, 20, 5, REMOVE);
	change(untouched, empty, 7, 9, INSTALL);
	if (mprotect(r.at + half * PAGE, half * PAGE, PROT_READ))
		die("mprotect");
	ready();
	wait_go();
	change(r, states, 30, 4, REMOVE);
	change(r, states, 200, 3, INSTALL);
	change(untouched, empty, 10, 2, REMOVE);
	expect_states(&t, r, states);
	expect_states(&t, untouched, empty);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		struct tally child = { .name = "guarded child" };

		expect_states(&child, r, states);
		report(&child);
		_exit(0);
	}
	expect_exit(&t, pid, 0);
	to = region_map(half);
	if (mremap(r.at, half * PAGE, half * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to.at) == MAP_FAILED)
		die("mremap");
	expect_states(&t, moved(slice(r, 0, half), to.at), states);
	expect_states(&t, slice(r, half, half), states + half);
	report(&t);
}

/* Whether all pages but the guards are there, without touching them. */
static bool are_there(struct region r, const char *states)
{
	static unsigned char there[PAGES(16 * MIB)];

	if (mincore(r.at, r.pages * PAGE, there))
		die("mincore");
	for (size_t i = 0; i < r.pages; i++)
		if (states[i] != GUARD && !(there[i] & 1))
			return false;
	return true;
}

/*
 * After the restore, on pages that are missing: says so, and waits until somebody has brought all others.  What the guards hid
 * is zero when they are gone.
 */
static void guards_late(void)
{
	size_t n = PAGES(16 * MIB);
	struct region r = region_new(n);
	static char states[PAGES(16 * MIB)];
	struct tally t = { .name = "guards late" }, installed = { .name = "installed" };

	catch_segv();
	ready();
	wait_go();
	for (size_t i = n - 16; i < n; i -= 16)
		change(r, states, i, 1 + i / 16 % 5, INSTALL);
	report(&installed);
	for (int tries = 0; !are_there(r, states) && tries < 30000; tries++)
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	expect(&t, are_there(r, states), "nobody brought the other pages");
	expect_states(&t, r, states);
	for (size_t i = 0; i < n; i += 64)
		change(r, states, i, 32, REMOVE);
	expect_states(&t, r, states);
	report(&t);
}

struct stack {
	pthread_t thread;
	struct region below; /* of which the lower half is the guard: a thread's stack above all */
	size_t number;
};

static void *with_guard(void *arg)
{
	struct stack *s = arg;
	struct tally t = { .name = "guarded thread" };
	volatile uint64_t local[256];

	for (size_t i = 0; i < 256; i++)
		local[i] = s->number << 32 | i;
	wait_go();
	for (size_t i = 0; i < 256; i++)
		expect(&t, local[i] == (s->number << 32 | i), "a thread's stack is not its own");
	for (size_t i = 0; i < 4; i++)
		if (no_guards)
			expect_data(&t, s->below, i);
		else
			expect_guard(&t, s->below.at + i * PAGE);
	for (size_t i = 4; i < 8; i++)
		expect_data(&t, s->below, i);
	report(&t);
	return NULL;
}

/* As glibc 2.42 does for every thread: the stack is one mapping, with a guard region at its lower end. */
static void guarded_threads(void)
{
	static struct stack stacks[8];
	pthread_attr_t attr;

	catch_segv();
	pthread_attr_init(&attr);
	for (size_t i = 0; i < 8; i++) {
		stacks[i].number = i + 1;
		stacks[i].below = region_map(64);
		stacks[i].below.pages = 8;
		fill(stacks[i].below);
		guard(stacks[i].below.at, 4, INSTALL);
		if (pthread_attr_setstack(&attr, stacks[i].below.at + 8 * PAGE, 56 * PAGE) ||
		    pthread_create(&stacks[i].thread, &attr, with_guard, &stacks[i]))
			die("pthread_create");
	}
	ready();
	for (size_t i = 0; i < 8; i++)
		pthread_join(stacks[i].thread, NULL);
}

const struct scenario guard_scenarios[] = {
	{ "guarded", guarded }, { "guards_late", guards_late }, { "guarded_threads", guarded_threads }, { 0 },
};
