/* Tasks that change their address space while pages are missing: mremap, munmap, madvise, mmap over it. */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned char *remap(void *from, size_t pages, size_t new_pages, int flags, void *to)
{
	unsigned char *at = mremap(from, pages * PAGE, new_pages * PAGE, flags, to);

	if (at == MAP_FAILED)
		die("mremap");
	return at;
}

static unsigned char *move(void *from, size_t pages, void *to)
{
	return remap(from, pages, pages, MREMAP_MAYMOVE | MREMAP_FIXED, to);
}

/* New zero memory at a fixed place, over whatever is there. */
static void fresh(void *at, size_t pages)
{
	if (mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		 -1, 0) != at)
		die("mmap");
}

static void unmap(void *at, size_t pages)
{
	if (munmap(at, pages * PAGE))
		die("munmap");
}

static void discard(void *at, size_t pages, int how)
{
	if (madvise(at, pages * PAGE, how))
		die("madvise");
}

/* Moves whole regions, a part out of the middle, and one that was read in part before. */
static void moves(void)
{
	size_t n = PAGES(6 * MIB), third = n / 3;
	struct region whole = region_new(n), middle = region_new(n), half = region_new(n), twice = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "moves" };
	struct region places[] = { region_map(n), region_map(n), region_map(n), region_map(n) };

	expect_region(&t, slice(half, 0, n / 2));
	move(whole.at, n, places[0].at);
	move(middle.at + third * PAGE, third, places[1].at);
	move(half.at, n, places[2].at);
	move(twice.at, n, places[3].at);
	fresh(whole.at, n);
	move(places[3].at, n, twice.at);
	expect_region(&t, moved(whole, places[0].at));
	expect_zeros(&t, whole.at, n);
	expect_region(&t, moved(slice(middle, third, third), places[1].at));
	expect_region(&t, slice(middle, 0, third));
	expect_region(&t, slice(middle, 2 * third, third));
	expect_region(&t, moved(half, places[2].at));
	expect_region(&t, twice);
	/* page by page, into every second page: the ranges interleave */
	struct region apart = region_map(64);
	for (size_t i = 0; i < 32; i++)
		move(twice.at + (n - 1 - i) * PAGE, 1, apart.at + 2 * i * PAGE);
	for (size_t i = 0; i < 32; i++) {
		expect_data(&t, moved(slice(twice, n - 1 - i, 1), apart.at + 2 * i * PAGE), 0);
		expect_zero(&t, apart.at + (2 * i + 1) * PAGE);
	}
	report(&t);
}

/* Moves lazy memory onto other lazy memory, which thereby is gone. */
static void moves_over(void)
{
	size_t n = PAGES(6 * MIB), quarter = n / 4;
	struct region a = region_new(n), b = region_new(n), c = region_new(n), d = region_new(n), e = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "moves_over" };
	struct region place = region_map(n);

	move(a.at, n, b.at);
	move(c.at, n, place.at); /* c and d change places */
	move(d.at, n, c.at);
	move(place.at, n, d.at);
	move(e.at, quarter, e.at + 2 * quarter * PAGE); /* within one region */
	expect_region(&t, moved(a, b.at));
	expect_region(&t, moved(c, d.at));
	expect_region(&t, moved(d, c.at));
	expect_region(&t, slice(e, quarter, quarter));
	expect_region(&t, moved(slice(e, 0, quarter), e.at + 2 * quarter * PAGE));
	expect_region(&t, slice(e, 3 * quarter, n - 3 * quarter));
	report(&t);
}

/* Shrinks and grows, in place and away; what was cut off must not come back. */
static void resizes(void)
{
	size_t n = PAGES(6 * MIB), half = n / 2;
	struct region shrunk = region_new(n), grown = region_new(n), wall = region_new(n), away = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "resizes" };
	/* mmap goes downwards: what was mapped before `grown` lies right above it, so that it must move to grow */
	remap(shrunk.at, n, half, 0, NULL);
	shrunk.at = remap(shrunk.at, half, n, MREMAP_MAYMOVE, NULL);
	grown.at = remap(grown.at, n, 2 * n, MREMAP_MAYMOVE, NULL);
	struct region place = region_map(3 * n);
	remap(away.at, n, 3 * n, MREMAP_MAYMOVE | MREMAP_FIXED, place.at);
	expect_region(&t, slice(shrunk, 0, half));
	expect_zeros(&t, shrunk.at + half * PAGE, n - half);
	expect_region(&t, grown);
	expect_zeros(&t, grown.at + n * PAGE, n);
	expect_region(&t, moved(away, place.at));
	expect_zeros(&t, place.at + n * PAGE, 2 * n);
	remap(place.at, 3 * n, half, 0, NULL);
	fresh(place.at + half * PAGE, half);
	expect_region(&t, moved(slice(away, 0, half), place.at));
	expect_zeros(&t, place.at + half * PAGE, half);
	expect_region(&t, wall);
	report(&t);
}

/* Moves contents and leaves the old mapping in place, which from then on reads as zero. */
static void leaves_behind(void)
{
	size_t n = PAGES(6 * MIB), half = n / 2;
	struct region a = region_new(n), b = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "leaves_behind" };
	struct region first = region_map(n), second = region_map(n);

	expect_region(&t, slice(b, 0, 100));
	remap(a.at, n, n, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, first.at);
	remap(b.at, n, n, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, second.at);
	expect_zeros(&t, a.at, half);
	expect_region(&t, moved(b, second.at));
	expect_region(&t, moved(a, first.at));
	expect_zeros(&t, a.at, n);
	expect_zeros(&t, b.at, n);
	fill(a); /* ordinary memory again, and it can move back */
	remap(a.at, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, first.at);
	expect_region(&t, moved(a, first.at));
	report(&t);
}

/* Unmaps ends, middle and whole regions, maps new memory there, maps over without unmapping. */
static void unmaps(void)
{
	size_t n = PAGES(6 * MIB), third = n / 3;
	struct region ends = region_new(n), middle = region_new(n), whole = region_new(n), over = region_new(n);
	struct region pieces = region_new(n), touched = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "unmaps" };
	expect_region(&t, touched);
	unmap(touched.at, n);
	unmap(ends.at, third);
	unmap(ends.at + (n - third) * PAGE, third);
	unmap(middle.at + third * PAGE, third);
	unmap(whole.at, n);
	fresh(over.at + third * PAGE, third);
	for (size_t i = 0; i < n; i += 4)
		unmap(pieces.at + i * PAGE, 1);
	fresh(ends.at, third);
	fresh(ends.at + (n - third) * PAGE, third);
	fresh(middle.at + third * PAGE, third);
	fresh(whole.at, n);
	fresh(touched.at, n);
	for (size_t i = 0; i < n; i += 4)
		fresh(pieces.at + i * PAGE, 1);
	expect_zeros(&t, ends.at, third);
	expect_region(&t, slice(ends, third, n - 2 * third));
	expect_zeros(&t, ends.at + (n - third) * PAGE, third);
	expect_region(&t, slice(middle, 0, third));
	expect_zeros(&t, middle.at + third * PAGE, third);
	expect_region(&t, slice(middle, 2 * third, n - 2 * third));
	expect_zeros(&t, whole.at, n);
	expect_region(&t, slice(over, 0, third));
	expect_zeros(&t, over.at + third * PAGE, third);
	expect_region(&t, slice(over, 2 * third, n - 2 * third));
	for (size_t i = 0; i < n; i++)
		if (i % 4)
			expect_data(&t, pieces, i);
		else
			expect_zero(&t, pieces.at + i * PAGE);
	expect_zeros(&t, touched.at, n);
	report(&t);
}

/* Gives pages up by madvise before and after they were read; they are zero from then on, their neighbours are not. */
static void discards(void)
{
	size_t n = PAGES(8 * MIB), quarter = n / 4, i;
	struct region a = region_new(n), b = region_new(n), freed = region_new(n);

	ready();
	wait_go();
	struct tally t = { .name = "discards" };
	discard(a.at + quarter * PAGE, quarter, MADV_DONTNEED);
	expect_region(&t, slice(a, 0, quarter));
	expect_zeros(&t, a.at + quarter * PAGE, quarter);
	expect_region(&t, slice(a, 2 * quarter, n - 2 * quarter));
	discard(a.at, 2 * quarter, MADV_DONTNEED); /* once more, over pages that are there */
	expect_zeros(&t, a.at, 2 * quarter);
	expect_region(&t, slice(a, 2 * quarter, n - 2 * quarter));
	for (i = 0; i < n; i += 3)
		discard(b.at + i * PAGE, 1, MADV_DONTNEED);
	for (struct walk w = walk_over(n, 1); walk_next(&w, &i);)
		if (i % 3)
			expect_data(&t, b, i);
		else
			expect_zero(&t, b.at + i * PAGE);
	fill(slice(a, 0, quarter)); /* pages that were given up can be written and keep it */
	expect_region(&t, slice(a, 0, quarter));
	/* MADV_FREE: the old bytes or zero, but what is written afterwards stays */
	discard(freed.at, 2 * quarter, MADV_FREE);
	for (i = 0; i < quarter; i++)
		expect_data_or_zero(&t, freed, i);
	fill(slice(freed, quarter, quarter));
	expect_region(&t, slice(freed, quarter, n - quarter));
	report(&t);
}

/*
 * A range past 2^31 and 2^32 bytes, a page here and there: every MiB one page of data, the next one never touched.
 */
#define HUGE_SIZE (6 * GIB)
#define HUGE_STEP PAGES(MIB)

static struct region huge_new(void)
{
	struct region r = region_map(PAGES(HUGE_SIZE));

	for (size_t i = 0; i < r.pages; i += HUGE_STEP)
		fill(slice(r, i, 1));
	return r;
}

/* r's pages from..to hold what huge_new put there, at their place in r */
static void expect_sparse(struct tally *t, struct region r, size_t from, size_t to)
{
	size_t step;

	for (struct walk w = walk_over((to - from) / HUGE_STEP, from); walk_next(&w, &step);) {
		size_t i = from + step * HUGE_STEP;

		expect_data(t, r, i);
		expect_zero(t, r.at + (i + 1) * PAGE);
	}
}

static void expect_sparse_zeros(struct tally *t, struct region r, size_t from, size_t to)
{
	for (size_t i = from; i < to; i += HUGE_STEP)
		expect_zero(t, r.at + i * PAGE);
}

static void huge_unmap(void)
{
	struct region r = huge_new();
	size_t from = PAGES(GIB), to = from + PAGES(7 * GIB / 2);

	ready();
	wait_go();
	struct tally t = { .name = "huge_unmap" };
	unmap(r.at + from * PAGE, to - from);
	expect_sparse(&t, r, 0, from);
	fresh(r.at + from * PAGE, to - from);
	expect_sparse_zeros(&t, r, from, to);
	expect_sparse(&t, r, to, r.pages);
	report(&t);
}

static void huge_discard(void)
{
	struct region r = huge_new();
	size_t from = PAGES(GIB), to = from + PAGES(9 * GIB / 2);

	ready();
	wait_go();
	struct tally t = { .name = "huge_discard" };
	discard(r.at + from * PAGE, to - from, MADV_DONTNEED);
	expect_sparse(&t, r, to, r.pages);
	expect_sparse_zeros(&t, r, from, to);
	expect_sparse(&t, r, 0, from);
	report(&t);
}

static void huge_move(void)
{
	struct region r = huge_new();
	size_t from = PAGES(GIB), to = from + PAGES(9 * GIB / 2);

	ready();
	wait_go();
	struct tally t = { .name = "huge_move" };
	struct region place = region_map(to - from);

	move(r.at + from * PAGE, to - from, place.at);
	expect_sparse(&t, moved(slice(r, from, to - from), place.at), 0, to - from);
	fresh(r.at + from * PAGE, to - from);
	expect_sparse_zeros(&t, r, from, to);
	expect_sparse(&t, r, 0, from);
	expect_sparse(&t, r, to, r.pages);
	report(&t);
}

/*
 * Moves everything to and fro, so that copies meet moves under way: a copy that waits for one finds nothing at the
 * old place, without an error of anybody.
 */
static void chase(void)
{
	size_t pages = PAGES(4 * GIB), step = 64, quarter = pages / 4, i;
	struct region data = region_map(pages);

	for (i = 0; i < pages; i += step)
		fill(slice(data, i, 1));
	ready();
	wait_go();
	struct tally t = { .name = "chase" };
	struct region away = moved(data, region_map(pages).at);

	for (int round = 0; round < 8; round++) {
		const struct region *from = round % 2 ? &away : &data, *to = round % 2 ? &data : &away;

		for (i = 0; i < pages; i += quarter)
			move(from->at + i * PAGE, quarter, to->at + i * PAGE);
	}
	for (struct walk w = walk_over(pages / step, 1); walk_next(&w, &i);)
		expect_data(&t, data, i * step);
	report(&t);
}

/*
 * Several threads at once: some change the layout, others touch the same and other pages meanwhile.
 */
static pthread_barrier_t start; /* no thread's stack may be mapped into a hole that another one made */
static struct region given_up, left, left_to, recycled, steady;
static const size_t chunk = 16;

static void *gives_up(void *unused)
{
	size_t i;

	pthread_barrier_wait(&start);
	for (struct walk w = walk_over(given_up.pages / chunk, 1); walk_next(&w, &i);)
		if (i % 2)
			discard(given_up.at + i * chunk * PAGE, chunk, MADV_DONTNEED);
	return unused;
}

static void *leaves(void *unused)
{
	size_t i;

	pthread_barrier_wait(&start);
	for (struct walk w = walk_over(left.pages / chunk, 2); walk_next(&w, &i);)
		remap(left.at + i * chunk * PAGE, chunk, chunk, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED,
		      left_to.at + i * chunk * PAGE);
	return unused;
}

static void *recycles(void *unused)
{
	struct tally t = { .name = "recycles" };
	size_t i;

	pthread_barrier_wait(&start);
	for (struct walk w = walk_over(recycled.pages / chunk, 3); walk_next(&w, &i);) {
		expect_data(&t, recycled, i * chunk);
		unmap(recycled.at + i * chunk * PAGE, chunk);
		fresh(recycled.at + i * chunk * PAGE, chunk);
		expect_zeros(&t, recycled.at + i * chunk * PAGE, chunk);
	}
	report(&t);
	return unused;
}

static void *splits(void *unused)
{
	pthread_barrier_wait(&start);
	for (size_t i = 0; i < steady.pages; i += 2 * chunk)
		if (mprotect(steady.at + i * PAGE, chunk * PAGE, PROT_READ))
			die("mprotect");
	return unused;
}

static void *reads_given_up(void *unused)
{
	struct tally t = { .name = "reads_given_up" };
	size_t i;

	pthread_barrier_wait(&start);
	for (struct walk w = walk_over(given_up.pages, 4); walk_next(&w, &i);)
		if (i / chunk % 2)
			expect_data_or_zero(&t, given_up, i);
		else
			expect_data(&t, given_up, i);
	report(&t);
	return unused;
}

static void *reads_left(void *unused)
{
	struct tally t = { .name = "reads_left" };
	size_t i;

	pthread_barrier_wait(&start);
	for (struct walk w = walk_over(left.pages, 5); walk_next(&w, &i);)
		expect_data_or_zero(&t, left, i);
	report(&t);
	return unused;
}

static void *reads_steady(void *unused)
{
	struct tally t = { .name = "reads_steady" };

	pthread_barrier_wait(&start);
	expect_region(&t, steady);
	report(&t);
	return unused;
}

static void races(void)
{
	void *(*bodies[])(void *) = { gives_up, leaves, recycles, splits, reads_given_up, reads_given_up,
				      reads_left, reads_left, reads_steady, reads_steady };
	size_t nr = sizeof bodies / sizeof *bodies, n = PAGES(8 * MIB), i;
	pthread_t threads[sizeof bodies / sizeof *bodies];

	given_up = region_new(n);
	left = region_new(n);
	recycled = region_new(n);
	steady = region_new(n);
	ready();
	wait_go();
	struct tally t = { .name = "races" };
	left_to = region_map(n);
	pthread_barrier_init(&start, NULL, nr);
	for (i = 0; i < nr; i++)
		if (pthread_create(&threads[i], NULL, bodies[i], NULL))
			die("pthread_create");
	for (i = 0; i < nr; i++)
		pthread_join(threads[i], NULL);
	expect_region(&t, moved(left, left_to.at));
	for (i = 0; i < n; i++) {
		if (i / chunk % 2)
			expect_zero(&t, given_up.at + i * PAGE);
		else
			expect_data(&t, given_up, i);
		expect_zero(&t, left.at + i * PAGE);
	}
	expect_zeros(&t, recycled.at, n);
	report(&t);
}

/* Far from everything, so that a long mapping over it meets nothing else. */
static struct region far_region(size_t pages)
{
	static uintptr_t next = 0x100000000000;
	struct region r = region_map(pages);

	r.at = move(r.at, pages, (void *)next);
	next += (uintptr_t)1 << 42;
	fill(r);
	return r;
}

/* What is left by a call that has failed: everything, or nothing. */
static void expect_all_or_nothing(struct tally *t, struct region r)
{
	unsigned char vec;

	if (!mincore(r.at, PAGE, &vec) || errno != ENOMEM)
		expect_region(t, r);
}

/* Calls that fail: the kernel has told by then that it unmaps something (csrc/serve/doubt.h). */
static void refused(void)
{
	size_t n = 64, half = n / 2;
	struct region sealed = far_region(n), middle = far_region(n), part = far_region(n);
	struct region memory = far_region(n), limited = far_region(n), onto = far_region(n), from = far_region(n);
	struct rlimit limit;

	ready();
	wait_go();
	struct tally t = { .name = "refused" };

	expect_region(&t, slice(part, half, 4));
	/* mseal(2), Linux 6.10: without it all is unmapped */
	bool can = !syscall(462, sealed.at + half * PAGE, half * PAGE, 0) &&
		   !syscall(462, middle.at + half * PAGE, half * PAGE, 0) &&
		   !syscall(462, part.at + (half + 4) * PAGE, (half - 4) * PAGE, 0) &&
		   !syscall(462, onto.at + half * PAGE, half * PAGE, 0);
	expect(&t, !munmap(sealed.at, n * PAGE) != can, "munmap of what is sealed");
	expect(&t, !munmap(middle.at + 8 * PAGE, (n - 8) * PAGE) != can, "munmap of a part");
	expect(&t, !munmap(part.at + half * PAGE, half * PAGE) != can, "munmap of a part that was read");
	expect(&t, (mremap(from.at, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, onto.at) == MAP_FAILED) == can,
	       "mremap onto what is sealed");
	expect(&t, mmap(memory.at, (size_t)1 << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			0) == MAP_FAILED, "mmap of more memory than there is");
	getrlimit(RLIMIT_AS, &limit);
	limit.rlim_cur = GIB;
	setrlimit(RLIMIT_AS, &limit);
	expect(&t, mmap(limited.at, 2 * GIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
			   MAP_FAILED, "mmap past RLIMIT_AS");
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_AS, &limit);
	if (can) {
		expect_region(&t, sealed);
		expect_region(&t, middle);
		expect_region(&t, part);
		expect_region(&t, onto);
		expect_region(&t, from);
	} else {
		expect_region(&t, slice(middle, 0, 8));
		expect_region(&t, slice(part, 0, half));
		expect_region(&t, moved(from, onto.at));
	}
	expect_all_or_nothing(&t, memory);
	expect_all_or_nothing(&t, limited);
	report(&t);
}

/* Shrinks and moves at once, to where other memory follows; shrinks, and grows again where it was. */
static void shrinks(void)
{
	size_t n = 64, less = 16;
	struct region moves = far_region(n), place = far_region(n), again = far_region(n), fresher = far_region(n);

	ready();
	wait_go();
	struct tally t = { .name = "shrinks" };

	remap(moves.at, n, less, MREMAP_MAYMOVE | MREMAP_FIXED, place.at);
	expect_region(&t, slice(moved(moves, place.at), 0, less));
	expect_region(&t, slice(place, less, n - less));
	fresh(fresher.at + less * PAGE, n - less);
	remap(place.at, less, 1, MREMAP_MAYMOVE | MREMAP_FIXED, fresher.at + (less - 1) * PAGE);
	expect_region(&t, slice(fresher, 0, less - 1));
	expect_region(&t, slice(moved(moves, fresher.at + (less - 1) * PAGE), 0, 1));
	expect_zeros(&t, fresher.at + less * PAGE, n - less);
	for (size_t keep = n - 4; keep >= 4; keep -= 4) {
		remap(again.at, keep + 4, keep, 0, NULL);
		remap(again.at, keep, keep + 4, 0, NULL);
		expect_zeros(&t, again.at + keep * PAGE, 4);
	}
	expect_region(&t, slice(again, 0, 4));
	report(&t);
}

const struct scenario layout_scenarios[] = {
	{ "refused", refused }, { "shrinks", shrinks },
	{ "moves", moves }, { "moves_over", moves_over }, { "resizes", resizes },
	{ "leaves_behind", leaves_behind }, { "unmaps", unmaps }, { "discards", discards },
	{ "huge_unmap", huge_unmap }, { "huge_discard", huge_discard }, { "huge_move", huge_move },
	{ "chase", chase }, { "races", races }, { 0 },
};
