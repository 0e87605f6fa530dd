/* Trees of tasks that exist at the checkpoint, a dead one among them. */
#define _GNU_SOURCE
#include "victim.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile unsigned *nr_ready;

static pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

/* Shared with all tasks of the tree; never lazy. */
static void share(void)
{
	nr_ready = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (nr_ready == MAP_FAILED)
		die("mmap");
}

static void wait_ready(unsigned nr)
{
	while (__atomic_load_n(nr_ready, __ATOMIC_SEQ_CST) < nr)
		usleep(1000);
}

/* Every third page is the task's own by copy-on-write, the others it still has from its ancestor. */
static void diverge(struct region r, uint64_t id)
{
	for (size_t i = 0; i < r.pages; i += 3) {
		struct region one = slice(r, i, 1);

		one.id = id;
		fill(one);
	}
}

static void expect_diverged(struct tally *t, struct region r, uint64_t id)
{
	size_t i;

	for (struct walk w = walk_over(r.pages, id); walk_next(&w, &i);) {
		struct region one = slice(r, i, 1);

		if (i % 3 == 0)
			one.id = id;
		expect_data(t, one, 0);
	}
}

static void member(struct region inherited, uint64_t id, const char *name)
{
	struct region own = region_map(PAGES(2 * MIB)), untouched = region_map(PAGES(MIB));

	own.id = id + 100;
	fill(own);
	diverge(inherited, id);
	__atomic_add_fetch(nr_ready, 1, __ATOMIC_SEQ_CST);
	wait_go();
	struct tally t = { .name = name };
	expect_region(&t, own);
	expect_diverged(&t, inherited, id);
	expect_zeros(&t, untouched.at, untouched.pages);
	report(&t);
}

/* Three children, the second with a child of its own, a dead child, memory inherited and shared. */
static void tree(void)
{
	struct region inherited = region_new(PAGES(6 * MIB));
	pid_t children[3];

	share();
	for (int i = 0; i < 3; i++) {
		children[i] = fork_or_die();
		if (children[i])
			continue;
		pid_t grandchild = i == 1 ? fork_or_die() : -1;
		if (!grandchild) {
			member(inherited, 2000, "grandchild");
			_exit(20);
		}
		member(inherited, 1000 + i, "child");
		if (i == 1) {
			struct tally t = { .name = "wait" };
			expect_exit(&t, grandchild, 20);
			report(&t);
		}
		_exit(10 + i);
	}
	pid_t dead = fork_or_die();
	if (!dead)
		_exit(7);
	siginfo_t info;
	if (waitid(P_PID, dead, &info, WEXITED | WNOWAIT)) /* it stays a zombie */
		die("waitid");
	wait_ready(4);
	ready();
	wait_go();
	struct tally t = { .name = "root" };
	expect_region(&t, inherited);
	expect_exit(&t, dead, 7);
	for (int i = 0; i < 3; i++)
		expect_exit(&t, children[i], 10 + i);
	expect(&t, *nr_ready == 4, "shared memory changed");
	report(&t);
}

/* Many small tasks. */
static void crowd(void)
{
	struct region inherited = region_new(100);
	pid_t children[40];

	share();
	for (int i = 0; i < 40; i++) {
		children[i] = fork_or_die();
		if (!children[i]) {
			member(inherited, 1000 + i, "child");
			_exit(i);
		}
	}
	wait_ready(40);
	ready();
	wait_go();
	struct tally t = { .name = "root" };
	expect_region(&t, inherited);
	for (int i = 0; i < 40; i++)
		expect_exit(&t, children[i], i);
	report(&t);
}

const struct scenario tree_scenarios[] = { { "tree", tree }, { "crowd", crowd }, { 0 } };
