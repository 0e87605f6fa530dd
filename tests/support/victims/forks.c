/* Tasks that fork, exec and exit while pages are missing, and system calls that touch missing pages. */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static pid_t fork_or_die(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	return pid;
}

/* Writes its number into the first words of the pages that are its own. */
static void tag(struct region r, size_t number, size_t of)
{
	size_t i;

	for (struct walk w = walk_over(r.pages / of, number); walk_next(&w, &i);)
		*(volatile uint64_t *)(r.at + (i * of + number) * PAGE) = number;
}

/* Pages number, number + of, … carry the tags of those that wrote before the fork and of this task; the others don't. */
static void expect_tags(struct tally *t, struct region r, size_t of, unsigned writers)
{
	size_t i;

	for (struct walk w = walk_over(r.pages, writers); walk_next(&w, &i);)
		expect_tagged(t, r, i, writers >> i % of & 1, i % of);
}

/* Parent, child and grandchild each write pages of their own and check everything, all at the same time. */
static void family(void)
{
	struct region data = region_new(PAGES(16 * MIB)), untouched = region_map(PAGES(2 * MIB));

	ready();
	wait_go();
	struct tally t = { .name = "parent" };
	tag(slice(data, 0, data.pages / 2), 1, 8); /* before the fork: all see it, in the first half */
	pid_t child = fork_or_die();
	if (!child) {
		t.name = "child";
		pid_t grandchild = fork_or_die();
		if (!grandchild)
			t.name = "grandchild";
		size_t number = grandchild ? 3 : 4;
		tag(data, number, 8);
		expect_tags(&t, slice(data, 0, data.pages / 2), 8, 1 << 1 | 1 << number);
		expect_tags(&t, slice(data, data.pages / 2, data.pages / 2), 8, 1 << number);
		expect_zeros(&t, untouched.at, untouched.pages);
		if (grandchild)
			expect_exit(&t, grandchild, 44);
		report(&t);
		_exit(grandchild ? 33 : 44);
	}
	tag(data, 2, 8);
	expect_tags(&t, slice(data, 0, data.pages / 2), 8, 1 << 1 | 1 << 2);
	expect_tags(&t, slice(data, data.pages / 2, data.pages / 2), 8, 1 << 2);
	expect_zeros(&t, untouched.at, untouched.pages);
	expect_exit(&t, child, 33);
	report(&t);
}

/* The child outlives the parent, which touches nothing at all. */
static void orphan(void)
{
	struct region data = region_new(PAGES(16 * MIB));
	int gate[2];
	char byte;

	ready();
	wait_go();
	struct tally t = { .name = "orphan" };
	/* the harness waits for the first task to end; so that one stays, and its child is the parent that goes */
	if (pipe(gate))
		die("pipe");
	pid_t parent = fork_or_die();
	if (!parent) {
		if (fork_or_die())
			_exit(5);
		close(gate[0]);
		expect_region(&t, data);
		report(&t);
		_exit(0);
	}
	close(gate[1]);
	struct tally mine = { .name = "first" };
	expect_exit(&mine, parent, 5);
	expect(&mine, read(gate[0], &byte, 1) == 0, "the orphan said something");
	expect_region(&mine, data);
	report(&mine);
}

/* Short-lived children: some exit at once, some touch a little, some exec; and children that share all memory. */
static void brief(void)
{
	struct region data = region_new(PAGES(16 * MIB));
	char *command[] = { "/bin/true", NULL };
	pid_t pids[24];

	ready();
	wait_go();
	struct tally t = { .name = "parent" };
	for (size_t i = 0; i < 24; i++) {
		pids[i] = fork_or_die();
		if (pids[i])
			continue;
		struct tally own = { .name = "child" };
		if (i % 3 == 0)
			_exit(i);
		if (i % 3 == 1) {
			execv("/bin/sh", (char *[]){ "sh", "-c", "exit $0", (char[]){ '0' + i / 10, '0' + i % 10, 0 }, NULL });
			_exit(99);
		}
		expect_region(&own, slice(data, i * data.pages / 24, data.pages / 24));
		report(&own);
		_exit(i);
	}
	for (size_t i = 0; i < 24; i++) {
		pid_t pid;

		if (posix_spawn(&pid, command[0], NULL, NULL, command, environ))
			die("posix_spawn");
		expect_region(&t, slice(data, i * data.pages / 24, data.pages / 24));
		expect_exit(&t, pid, 0);
		expect_exit(&t, pids[i], i);
	}
	expect_region(&t, data);
	report(&t);
}

/* After the fork, one side changes its layout; the other side's memory must not notice. */
static void partings(void)
{
	size_t n = PAGES(8 * MIB), half = n / 2;
	struct region a = region_new(n), b = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "parent" };
	pid_t child = fork_or_die();
	struct region mine = child ? a : b, other = child ? b : a, place = region_map(n);

	t.name = child ? "parent" : "child";
	if (munmap(mine.at, half * PAGE) ||
	    mremap(mine.at + half * PAGE, half * PAGE, half * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place.at) == MAP_FAILED)
		die("munmap or mremap");
	expect_region(&t, other);
	if (madvise(other.at, half * PAGE, MADV_DONTNEED))
		die("madvise");
	expect_region(&t, moved(slice(mine, half, half), place.at));
	expect_zeros(&t, other.at, half);
	expect_region(&t, slice(other, half, half));
	if (child)
		expect_exit(&t, child, 0);
	report(&t);
	if (!child)
		_exit(0);
}

static void advise(struct region wiped, struct region hidden)
{
	if (madvise(wiped.at, wiped.pages * PAGE, MADV_WIPEONFORK) ||
	    madvise(hidden.at, hidden.pages * PAGE, MADV_DONTFORK))
		die("madvise");
}

/* Memory that a child does not inherit (MADV_DONTFORK) or finds empty (MADV_WIPEONFORK), advised before or after. */
static void inherit(const char *name, bool late)
{
	size_t n = PAGES(4 * MIB);
	struct region data = region_new(n), wiped = region_new(n), between = region_new(n), hidden = region_new(n);
	struct region below = region_new(n);
	struct tally t = { .name = name };

	if (!late)
		advise(wiped, hidden);
	ready();
	wait_go();
	if (late)
		advise(wiped, hidden);
	pid_t child = fork_or_die();
	if (!child) {
		expect_zeros(&t, wiped.at, n);
		expect(&t, msync(hidden.at, PAGE, MS_ASYNC) && errno == ENOMEM, "MADV_DONTFORK memory was inherited");
		expect_region(&t, data);
		expect_region(&t, between);
		expect_region(&t, below);
		report(&t);
		_exit(0);
	}
	expect_exit(&t, child, 0);
	expect_region(&t, wiped);
	expect_region(&t, hidden);
	expect_region(&t, between);
	expect_region(&t, data);
	expect_region(&t, below);
	report(&t);
}

static void inherit_early(void)
{
	inherit("inherit_early", false);
}

static void inherit_late(void)
{
	inherit("inherit_late", true);
}

static struct region common;

static void *reads_common(void *unused)
{
	struct tally t = { .name = "reader" };

	expect_region(&t, common);
	report(&t);
	return unused;
}

/* Threads fault while another thread forks again and again. */
static void forks_under_load(void)
{
	pthread_t readers[3];

	common = region_new(PAGES(16 * MIB));
	ready();
	wait_go();
	struct tally t = { .name = "parent" };
	for (size_t i = 0; i < 3; i++)
		if (pthread_create(&readers[i], NULL, reads_common, NULL))
			die("pthread_create");
	for (size_t i = 0; i < 8; i++) {
		pid_t child = fork_or_die();

		if (!child) {
			struct tally own = { .name = "child" };
			expect_region(&own, slice(common, i * common.pages / 8, common.pages / 8));
			report(&own);
			_exit(i);
		}
		expect_exit(&t, child, i);
	}
	for (size_t i = 0; i < 3; i++)
		pthread_join(readers[i], NULL);
	expect_region(&t, common);
	report(&t);
}

static void *wakes(void *word)
{
	*(volatile int *)word = 1;
	syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
	return NULL;
}

/* The first to touch a missing page is the kernel, for a system call of this task or of another one. */
static void syscalls(void)
{
	size_t n = PAGES(2 * MIB);
	struct region out = region_new(n), in = region_new(n), vector = region_new(n), locked = region_new(n);
	struct region populated = region_new(n), peeked = region_new(n), futexes = region_map(1);
	int ends[2];

	ready();
	wait_go();
	struct tally t = { .name = "syscalls" };
	struct region copy = moved(out, region_map(n).at);

	if (pipe(ends))
		die("pipe");
	for (size_t i = 0; i < n; i++) { /* write from a missing page, read over half of another one */
		if (write(ends[1], out.at + i * PAGE, PAGE) != (ssize_t)PAGE ||
		    read(ends[0], copy.at + i * PAGE, PAGE) != (ssize_t)PAGE)
			die("write and read");
		expect_data(&t, copy, i);
		if (write(ends[1], (uint64_t[]){ i, i }, 16) != 16 || read(ends[0], in.at + i * PAGE, 16) != 16)
			die("write and read");
		expect_tagged(&t, in, i, 2, i);
	}
	if (process_vm_readv(getpid(), &(struct iovec){ copy.at, n * PAGE }, 1,
			     &(struct iovec){ vector.at, n * PAGE }, 1, 0) != (ssize_t)(n * PAGE))
		die("process_vm_readv");
	expect_region(&t, moved(vector, copy.at));
	if (mlock(locked.at, n * PAGE))
		die("mlock");
	expect_region(&t, locked);
	if (madvise(populated.at, n * PAGE, MADV_POPULATE_WRITE))
		die("MADV_POPULATE_WRITE");
	expect_region(&t, populated);
	pid_t child = fork_or_die(); /* reads its parent's memory from outside */
	if (!child) {
		struct tally own = { .name = "peek" };

		if (process_vm_readv(getppid(), &(struct iovec){ copy.at, n * PAGE }, 1,
				     &(struct iovec){ peeked.at, n * PAGE }, 1, 0) != (ssize_t)(n * PAGE))
			die("process_vm_readv");
		expect_region(&own, moved(peeked, copy.at));
		report(&own);
		_exit(0);
	}
	expect_exit(&t, child, 0);
	pthread_t waker;
	if (pthread_create(&waker, NULL, wakes, futexes.at))
		die("pthread_create");
	while (!*(volatile int *)futexes.at)
		syscall(SYS_futex, futexes.at, FUTEX_WAIT, 0, NULL, NULL, 0);
	pthread_join(waker, NULL);
	report(&t);
}

const struct scenario fork_scenarios[] = {
	{ "family", family }, { "orphan", orphan }, { "brief", brief }, { "partings", partings },
	{ "inherit_early", inherit_early }, { "inherit_late", inherit_late }, { "forks_under_load", forks_under_load },
	{ "syscalls", syscalls }, { 0 },
};
