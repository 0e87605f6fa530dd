/*
 * A task that registers memory of its own, hands its uffd over, and then does
 * what it is told: one command a line on the socket whose number is its
 * argument; each is answered with "ok ..." or "no <what went wrong>".
 *
 * A page is known by its id: 512 times the same 64-bit number, zero for a page
 * of zeros.  So no page can stand for another, and none can be half there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define MAX_THREADS 16
#define STACK (64ul << 10)

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static int control, uffd = -1;

/* ---- talking ---- */

static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	line[n++] = '\n';
	if (write(control, line, (size_t)n) != n)
		_exit(3);
}

static void send_fd(int fd)
{
	char space[CMSG_SPACE(sizeof(int))] = {0}, byte = '\n';
	struct iovec iov = {&byte, 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space)};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
	if (sendmsg(control, &msg, 0) != 1)
		_exit(3);
}

/* ---- helpers ---- */

static uint64_t mix(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static void *xcalloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p)
		_exit(4);
	return p;
}

/* Runs function in n threads, with the elements of an array as arguments; their stacks bring no layout events. */
static void run_threads(void *(*function)(void *), void *args, size_t size, int n)
{
	static char stacks[MAX_THREADS][STACK] __attribute__((aligned(4096)));
	pthread_t threads[MAX_THREADS];

	for (int i = 0; i < n; i++) {
		pthread_attr_t attr;

		pthread_attr_init(&attr);
		pthread_attr_setstack(&attr, stacks[i], STACK);
		if (pthread_create(&threads[i], &attr, function, (char *)args + (size_t)i * size))
			_exit(4);
	}
	for (int i = 0; i < n; i++)
		pthread_join(threads[i], NULL);
}

static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t may_escape;

static void on_signal(int number)
{
	if (!may_escape)
		_exit(100 + number);
	siglongjmp(escape, number);
}

/* The first thing found wrong, by whatever thread. */
static struct {
	_Atomic bool is;
	char text[256];
} bad;

static void found_bad(const char *format, ...)
{
	va_list args;

	if (atomic_exchange(&bad.is, true))
		return;
	va_start(args, format);
	vsnprintf(bad.text, sizeof(bad.text), format, args);
	va_end(args);
}

static void say_found(const char *format, ...)
{
	char text[128];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (bad.is)
		say("no %s", bad.text);
	else
		say("ok %s", text);
	bad.is = false;
}

/* What is wrong with a page that should have this id; NULL: nothing. */
static const char *wrong(const void *at, uint64_t id)
{
	const volatile uint64_t *words = at;
	uint64_t first = words[0];

	for (size_t i = 1; i < WORDS; i++)
		if (words[i] != first)
			return "a torn page";
	if (first == id)
		return NULL;
	return first ? "another page" : "zeros";
}

static void look(const char *at, uint64_t id, const char *when)
{
	const char *what = wrong(at, id);

	if (what)
		found_bad("%s: %s (%#lx) at %p where id %#lx should be", when, what, *(const uint64_t *)at,
			  (const void *)at, id);
}

/* ---- check: visits pages with ids that follow each other, or zeros ---- */

enum order { FORWARD, BACKWARD, RANDOM };

struct walk {
	char *at;
	size_t pages;
	uint64_t id; /* 0: all are zero */
	enum order order;
	bool writes, together; /* together: each thread visits every page */
	_Atomic size_t next;
	size_t *shuffled;
};

static void *walk_thread(void *arg)
{
	struct walk *w = *(struct walk **)arg;
	size_t own = 0, i;

	while ((i = w->together ? own++ : atomic_fetch_add(&w->next, 1)) < w->pages) {
		size_t page = w->order == FORWARD ? i : w->order == BACKWARD ? w->pages - 1 - i : w->shuffled[i];

		if (w->writes) /* a fault for writing that changes nothing */
			atomic_fetch_or((_Atomic uint64_t *)(w->at + page * PAGE), 0);
		look(w->at + page * PAGE, w->id ? w->id + page : 0, "check");
	}
	return NULL;
}

static void check(uint64_t at, size_t pages, uint64_t id, enum order order, int threads, bool writes, bool together)
{
	struct walk w = {
		.at = (char *)at, .pages = pages, .id = id, .order = order, .writes = writes, .together = together};
	struct walk *args[MAX_THREADS];
	uint64_t seed = id + pages;

	w.shuffled = xcalloc(pages + 1, sizeof(size_t));
	for (size_t i = 0; i < pages; i++) {
		size_t j = mix(&seed) % (i + 1);

		w.shuffled[i] = w.shuffled[j];
		w.shuffled[j] = i;
	}
	for (int i = 0; i < threads; i++)
		args[i] = &w;
	run_threads(walk_thread, args, sizeof(args[0]), threads);
	free(w.shuffled);
	say_found("");
}

static void peek(uint64_t at)
{
	int number;

	may_escape = 1;
	number = sigsetjmp(escape, 1);
	if (!number) {
		uint64_t id = *(volatile uint64_t *)at;
		const char *what = wrong((void *)at, id);

		may_escape = 0;
		if (what)
			say("no %s", what);
		else
			say("ok %lu", id);
		return;
	}
	may_escape = 0;
	say("ok signal %d", number);
}

#define MADV_GUARD_INSTALL_ 102 /* linux/mman.h, 6.13 */

static void *guard_when_told(void *at)
{
	sigset_t set;
	int number;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigwait(&set, &number);
	madvise(at, PAGE, MADV_GUARD_INSTALL_); /* or not, on an older kernel */
	return NULL;
}

/* As peek; another thread makes a guard of the page at SIGUSR1. */
static void peek_guarded(uint64_t at)
{
	pthread_t thread;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	if (pthread_create(&thread, NULL, guard_when_told, (void *)at))
		_exit(4);
	peek(at);
	pthread_join(thread, NULL);
}

/* ---- churn: one thread changes the layout, others touch at the same time ---- */

#define NOWHERE UINT64_MAX /* not mapped */

/*
 * Page i of the arena should have the id expect[i].  The layout thread makes `changing` odd, changes, says what it
 * expects now, and makes it even.  Others touch at all times; who finds the same even number before and after knows
 * what had to be there.
 */
struct churn {
	char *at;
	size_t pages, rounds, longest;
	uint64_t seed;
	_Atomic uint64_t *expect;
	_Atomic uint64_t changing, done[6];
	_Atomic bool over;
	_Atomic uint64_t touched, sure;
};

struct worker {
	struct churn *churn;
	uint64_t seed; /* 0: the one that changes the layout */
};

static void touch(struct churn *c, uint64_t *seed)
{
	size_t page = mix(seed) % c->pages;
	uint64_t before = c->changing, expected = c->expect[page];
	const char *at = c->at + page * PAGE, *what;

	may_escape = 1;
	if (sigsetjmp(escape, 1)) { /* unmapped, perhaps under our feet */
		may_escape = 0;
		if (before % 2 == 0 && c->changing == before && expected != NOWHERE)
			found_bad("touched: nothing at page %zu where id %#lx should be", page, expected);
		return;
	}
	what = wrong(at, expected);
	may_escape = 0;
	c->touched++;
	if (before % 2 || c->changing != before)
		return;
	c->sure++;
	if (expected == NOWHERE)
		found_bad("touched: something at page %zu where nothing should be", page);
	else if (what)
		found_bad("touched: %s at page %zu where id %#lx should be", what, page, expected);
}

static void set_expect(struct churn *c, size_t from, size_t n, uint64_t id)
{
	for (size_t i = from; i < from + n; i++)
		c->expect[i] = id;
}

static size_t run_of(struct churn *c, size_t from, size_t most, bool mapped)
{
	size_t n = 0;

	while (n < most && from + n < c->pages && (c->expect[from + n] != NOWHERE) == mapped)
		n++;
	return n;
}

/* Where to look after a change. */
struct spot {
	size_t from, n;
	const char *when;
};

static void change(struct churn *c, struct spot spots[2])
{
	size_t from = mix(&c->seed) % c->pages, n = run_of(c, from, 1 + mix(&c->seed) % c->longest, true);
	size_t to = mix(&c->seed) % (c->pages - n + 1), kind = mix(&c->seed) % 6, more = 0;
	bool apart = to >= from + n || from >= to + n;
	char *old = c->at + from * PAGE, *new = c->at + to * PAGE;
	unsigned char vec;

	if (!n)
		return;
	switch (kind) {
	case 0:
		if (madvise(old, n * PAGE, MADV_DONTNEED))
			return;
		set_expect(c, from, n, 0);
		spots[0] = (struct spot){from, n, "after madvise"};
		break;
	case 1:
		if (mix(&c->seed) % 4 || munmap(old, n * PAGE)) /* rarely: nothing comes back */
			return;
		set_expect(c, from, n, NOWHERE);
		break;
	case 2:
	case 3: /* fails when the pages are more than one VMA, and then what was at `to` may be gone all the same */
		if (!apart)
			return;
		if (mremap(old, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | (kind == 3 ? MREMAP_DONTUNMAP : 0),
			   new) == MAP_FAILED) {
			for (size_t i = to; i < to + n; i++)
				if (mincore(c->at + i * PAGE, PAGE, &vec) && errno == ENOMEM)
					c->expect[i] = NOWHERE;
			return;
		}
		for (size_t i = 0; i < n; i++) {
			c->expect[to + i] = c->expect[from + i];
			c->expect[from + i] = kind == 3 ? 0 : NOWHERE;
		}
		spots[0] = (struct spot){to, n, "after mremap"};
		spots[1] = (struct spot){from, n, "what DONTUNMAP left"};
		break;
	case 4:
		if (n < 2 || mremap(old, n * PAGE, n / 2 * PAGE, 0) == MAP_FAILED)
			return;
		set_expect(c, from + n / 2, n - n / 2, NOWHERE);
		spots[0] = (struct spot){from, n / 2, "after shrinking"};
		break;
	case 5: /* into a hole, in place */
		more = run_of(c, from + n, 16, false);
		if (!more || mremap(old, n * PAGE, (n + more) * PAGE, 0) == MAP_FAILED)
			return;
		set_expect(c, from + n, more, 0);
		spots[0] = (struct spot){from, n + more, "after growing"};
		break;
	}
	c->done[kind]++;
}

/* At a few pages only: the others are to stay away as long as they can. */
static void look_at_spot(struct churn *c, const struct spot *spot)
{
	size_t some[] = {spot->from, spot->from + spot->n - 1, spot->from + mix(&c->seed) % (spot->n ? spot->n : 1)};

	for (size_t i = 0; i < 3 && spot->n; i++)
		if (c->expect[some[i]] != NOWHERE)
			look(c->at + some[i] * PAGE, c->expect[some[i]], spot->when);
}

static void *churn_thread(void *arg)
{
	struct worker *w = arg;
	struct churn *c = w->churn;

	if (w->seed)
		while (!c->over)
			touch(c, &w->seed);
	for (size_t round = 0; !w->seed && round < c->rounds && !bad.is; round++) {
		struct spot spots[2] = {0};

		c->changing++;
		change(c, spots);
		c->changing++;
		look_at_spot(c, &spots[0]);
		look_at_spot(c, &spots[1]);
	}
	if (!w->seed)
		c->over = true;
	return NULL;
}

static void churn(uint64_t at, size_t pages, uint64_t id, uint64_t seed, size_t rounds, size_t longest, int touchers)
{
	struct churn c = {.at = (char *)at, .pages = pages, .rounds = rounds, .longest = longest, .seed = seed};
	struct worker workers[MAX_THREADS];

	c.expect = xcalloc(pages, sizeof(*c.expect));
	for (size_t i = 0; i < pages; i++)
		c.expect[i] = id + i;
	for (int i = 0; i <= touchers; i++)
		workers[i] = (struct worker){&c, i ? seed + (uint64_t)i : 0};
	run_threads(churn_thread, workers, sizeof(workers[0]), touchers + 1);
	for (size_t i = 0; i < pages && !bad.is; i++)
		if (c.expect[i] != NOWHERE)
			look(c.at + i * PAGE, c.expect[i], "at the end");
	say_found("touched %lu, %lu for sure, madvise %lu, munmap %lu, mremap %lu and %lu, shrunk %lu, grown %lu", c.touched, c.sure,
		  c.done[0], c.done[1], c.done[2], c.done[3], c.done[4], c.done[5]);
	free((void *)c.expect);
}

/* ---- swarm: threads that move memory of their own to where the kernel finds room ---- */

/*
 * Nobody touches what another thread owns.  But the room that mremap finds is often what another thread is leaving at
 * this moment, and whose event is not read yet.
 */
struct chunk {
	char *at;
	size_t pages;
	uint64_t *ids;
};

struct swarmer {
	struct chunk *chunks;
	size_t nr, rounds, most;
	uint64_t seed;
};

static void look_at_chunk(struct swarmer *s, const struct chunk *c, const char *when)
{
	size_t some[] = {0, c->pages - 1, mix(&s->seed) % c->pages};

	for (size_t i = 0; i < 3; i++)
		look(c->at + some[i] * PAGE, c->ids[some[i]], when);
}

static void *swarm_thread(void *arg)
{
	struct swarmer *s = arg;

	for (size_t round = 0; round < s->rounds && s->nr && !bad.is; round++) {
		size_t which = mix(&s->seed) % s->nr;
		struct chunk *c = &s->chunks[which];
		size_t len = c->pages * PAGE, n;
		char *at;

		switch (mix(&s->seed) % 8) {
		case 0:
		case 1: /* as realloc does: moves when there is no room behind it */
		case 2:
			n = c->pages + 1 + mix(&s->seed) % 8;
			if (n > s->most)
				continue;
			at = mremap(c->at, len, n * PAGE, MREMAP_MAYMOVE);
			if (at == MAP_FAILED)
				_exit(5);
			memset(c->ids + c->pages, 0, (n - c->pages) * sizeof(*c->ids));
			c->at = at;
			c->pages = n;
			look_at_chunk(s, c, "after growing");
			break;
		case 3:
		case 4: /* moves in any case */
			at = mremap(c->at, len, len, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
			if (at == MAP_FAILED)
				_exit(5);
			look(c->at, 0, "what DONTUNMAP left");
			if (munmap(c->at, len))
				_exit(5);
			c->at = at;
			look_at_chunk(s, c, "after moving");
			break;
		case 5:
			n = 1 + mix(&s->seed) % 8;
			if (n >= c->pages)
				continue;
			if (mremap(c->at, len, (c->pages - n) * PAGE, 0) != c->at)
				_exit(5);
			c->pages -= n;
			look_at_chunk(s, c, "after shrinking");
			break;
		case 6:
			n = mix(&s->seed) % c->pages;
			if (madvise(c->at + n * PAGE, PAGE, MADV_DONTNEED))
				_exit(5);
			c->ids[n] = 0;
			look(c->at + n * PAGE, 0, "after madvise");
			break;
		case 7:
			if (mix(&s->seed) % 16)
				continue;
			if (munmap(c->at, len))
				_exit(5);
			*c = s->chunks[--s->nr];
			break;
		}
	}
	for (size_t i = 0; i < s->nr; i++)
		for (size_t page = 0; page < s->chunks[i].pages; page++)
			look(s->chunks[i].at + page * PAGE, s->chunks[i].ids[page], "at the end");
	return NULL;
}

static void swarm(uint64_t at, size_t pages, uint64_t id, uint64_t seed, size_t rounds, size_t size, int threads)
{
	struct swarmer swarmers[MAX_THREADS];
	size_t each = pages / size / (size_t)threads, most = size * 4;

	for (int i = 0; i < threads; i++) {
		struct swarmer *s = &swarmers[i];

		*s = (struct swarmer){xcalloc(each, sizeof(*s->chunks)), each, rounds, most, seed + (uint64_t)i};
		for (size_t k = 0; k < each; k++) { /* dealt out: neighbours have different owners */
			size_t first = (k * (size_t)threads + (size_t)i) * size;

			s->chunks[k] = (struct chunk){(char *)at + first * PAGE, size, xcalloc(most, sizeof(uint64_t))};
			for (size_t page = 0; page < size; page++)
				s->chunks[k].ids[page] = id + first + page;
		}
	}
	run_threads(swarm_thread, swarmers, sizeof(swarmers[0]), threads);
	say_found("");
}

/* ---- race: what leaves a place is slow to say so, and another arrives there meanwhile ---- */

/*
 * The leaver shares its CPU with a thread that takes nearly all of it, so that it is slow to wake up when its first
 * event has been read, and to tell the second (mremap tells where it went, then that the old place is unmapped).
 */
struct race {
	char *place, *aside, *other, *onward; /* leaver: place -> aside, or away; arriver: other -> place (-> onward) */
	size_t pages;
	_Atomic bool go, over;
};

struct racer {
	struct race *race;
	int role;
};

/* To the first or, if there is one, the second of the CPUs that we may use. */
static void pin(int which)
{
	cpu_set_t all, one;

	if (sched_getaffinity(getpid(), sizeof(all), &all))
		_exit(6);
	CPU_ZERO(&one);
	for (int cpu = 0; cpu < CPU_SETSIZE && which >= 0; cpu++)
		if (CPU_ISSET(cpu, &all)) {
			CPU_ZERO(&one);
			CPU_SET(cpu, &one);
			which--;
		}
	if (sched_setaffinity(0, sizeof(one), &one))
		_exit(6);
}

static void *race_thread(void *arg)
{
	struct racer *me = arg;
	struct race *r = me->race;
	const struct sched_param param = {0};
	unsigned char vec;

	switch (me->role) {
	case 0:
		pin(0);
		if (sched_setscheduler(0, SCHED_IDLE, &param))
			_exit(6);
		r->go = true;
		if (r->aside ? mremap(r->place, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
				      r->aside) == MAP_FAILED :
			       munmap(r->place, r->pages * PAGE))
			_exit(5);
		break;
	case 1:
		pin(1);
		while (!r->go || !mincore(r->place, PAGE, &vec) || errno != ENOMEM)
			;
		if (mremap(r->other, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, r->place) ==
		    MAP_FAILED)
			_exit(5);
		if (r->onward && mremap(r->place, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
					r->onward) == MAP_FAILED)
			_exit(5);
		r->over = true;
		break;
	default:
		pin(0);
		while (!r->over)
			;
	}
	return NULL;
}

/* aside 0: the leaver unmaps; onward 0: the arriver stays. */
static void race(uint64_t place, uint64_t aside, uint64_t other, uint64_t onward, size_t pages, uint64_t place_id,
		 uint64_t other_id)
{
	struct race r = {(char *)place, (char *)aside, (char *)other, (char *)onward, pages, false, false};
	struct racer racers[] = {{&r, 0}, {&r, 1}, {&r, 2}};

	run_threads(race_thread, racers, sizeof(racers[0]), 3);
	for (size_t i = 0; i < pages; i++) {
		look((char *)(onward ? onward : place) + i * PAGE, other_id + i, "what arrived");
		if (aside)
			look((char *)aside + i * PAGE, place_id + i, "what left");
	}
	say_found("");
}

/* ---- memory that grows again where it was unmapped ---- */

/* Chunk after chunk loses its second half and grows back in place, which no event tells. */
static void regrow(uint64_t at, size_t pages, uint64_t id, size_t chunks, size_t stride)
{
	for (size_t c = 0; c < chunks && !bad.is; c++) {
		char *chunk = (char *)at + c * stride * PAGE;
		size_t half = pages / 2;

		if (mremap(chunk, pages * PAGE, half * PAGE, 0) != chunk || mremap(chunk, half * PAGE, pages * PAGE, 0) != chunk)
			_exit(5);
		for (size_t i = 0; i < pages; i++)
			look(chunk + i * PAGE, i < half ? id + c * pages + i : 0, "after it grew again");
	}
	say_found("");
}

/* ---- forks that are told late ---- */

/*
 * One thread forks, slowly and with little right to the CPU; another changes the layout as soon as that lets it, and is told
 * first.  Both on one CPU, so that the kernel lets the second go on before the first has told.
 */
struct late {
	char *place, *aside; /* aside NULL: unmapped */
	size_t pages;
	uint64_t id;
	_Atomic bool go;
	int status;
};

static bool readable(const char *at)
{
	may_escape = 1;
	if (sigsetjmp(escape, 1)) {
		may_escape = 0;
		return false;
	}
	(void)*(const volatile char *)at;
	may_escape = 0;
	return true;
}

/* In the child: before the change or after it, and nothing else. */
static void check_late(const struct late *l)
{
	bool before = readable(l->place);
	const char *at = before ? l->place : l->aside;

	bad.is = false;
	for (size_t i = 0; i < l->pages; i++) {
		if (before != readable(l->place + i * PAGE) || (l->aside && before == readable(l->aside + i * PAGE)))
			_exit(20);
		if (at)
			look(at + i * PAGE, l->id + i, "");
	}
	_exit(bad.is ? 21 : before ? 30 : 31);
}

static void *late_thread(void *arg)
{
	struct racer *me = arg;
	struct late *l = (struct late *)me->race;
	const struct sched_param param = {0};
	pid_t pid;

	pin(0);
	if (me->role) {
		while (!l->go)
			usleep(50);
		if (l->aside ? mremap(l->place, l->pages * PAGE, l->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, l->aside) ==
				       MAP_FAILED :
			       munmap(l->place, l->pages * PAGE))
			_exit(5);
		return NULL;
	}
	if (sched_setscheduler(0, SCHED_IDLE, &param))
		_exit(6);
	l->go = true;
	pid = fork();
	if (!pid)
		check_late(l);
	if (pid < 0 || waitpid(pid, &l->status, 0) != pid)
		_exit(7);
	return NULL;
}

/* ballast: pages of other memory, which a fork copies the tables of. */
static void late(uint64_t place, uint64_t aside, size_t pages, uint64_t id, size_t ballast)
{
	struct late l = {(char *)place, (char *)aside, pages, id, false, 0};
	struct racer racers[] = {{(struct race *)&l, 0}, {(struct race *)&l, 1}};
	static char *weight;

	if (!weight)
		weight = mmap(NULL, ballast * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	run_threads(late_thread, racers, sizeof(racers[0]), 2);
	if (WIFSIGNALED(l.status))
		say("ok signal %d", WTERMSIG(l.status));
	else if (WEXITSTATUS(l.status) < 30)
		say("no a child found %s", WEXITSTATUS(l.status) == 20 ? "half of a change" : "another page");
	else
		say("ok %s", WEXITSTATUS(l.status) == 30 ? "before" : "after");
}

/* ---- a child that changes its layout before it can be asked what it has ---- */

/*
 * One of them is always told of, or has to run before the kernel counts it no more.  Those of the child have hardly any right to
 * their CPU, which another thread has from "settle" on.
 */
#define TURNERS 8

struct turner {
	_Atomic bool *calm;
	char *page;
	bool in_child;
};

static struct {
	struct turner turners[TURNERS];
	pthread_t threads[TURNERS];
	pthread_t hog;
	_Atomic int turning;
	struct {
		_Atomic bool parent, child;
	} *calm; /* shared with the child */
	pid_t child;
} restless;

static void *turn(void *arg)
{
	const struct sched_param param = {0};
	struct turner *me = arg;

	if (me->in_child) {
		pin(0);
		if (sched_setscheduler(0, SCHED_IDLE, &param))
			_exit(6);
	}
	for (bool first = true; !*me->calm; first = false) {
		if (madvise(me->page, PAGE, MADV_DONTNEED))
			_exit(5);
		restless.turning += first;
	}
	return NULL;
}

static void *hog(void *arg)
{
	(void)arg;
	pin(0);
	while (!restless.calm->child)
		;
	return NULL;
}

static void begin_turning(_Atomic bool *calm, char *at, bool in_child)
{
	for (int i = 0; i < TURNERS; i++) {
		restless.turners[i] = (struct turner){calm, at + (size_t)i * PAGE, in_child};
		if (pthread_create(&restless.threads[i], NULL, turn, &restless.turners[i]))
			_exit(4);
	}
}

static void end_turning(void)
{
	for (int i = 0; i < TURNERS; i++)
		pthread_join(restless.threads[i], NULL);
}

static void begin_unrest(char *at)
{
	restless.calm = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (restless.calm == MAP_FAILED)
		_exit(7);
	begin_turning(&restless.calm->parent, at, false);
	while (restless.turning < TURNERS)
		usleep(100);
}

/* It may have ended already. */
static void end_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
}

/* 0 in the child */
static pid_t fork_in_unrest(void)
{
	pid_t parent = getpid();

	restless.child = fork();
	if (restless.child < 0)
		_exit(7);
	if (!restless.child)
		end_with(parent);
	else
		say("ok %d", (int)restless.child);
	return restless.child;
}

static void check_and_exit(const char *at, size_t pages, uint64_t id)
{
	bad.is = false;
	for (size_t i = 0; i < pages; i++)
		if (readable(at + i * PAGE))
			look(at + i * PAGE, id + i, "");
	_exit(bad.is ? 21 : 0);
}

/*
 * Pages are unmapped and a child is forked while other threads keep the layout from coming to rest, until "settle".  The child's
 * threads do the same, until "calm".  at: TURNERS pages for that, and the same number for the child.
 */
static void fork_restless(uint64_t at, uint64_t unmapped, uint64_t kept, size_t pages, uint64_t id)
{
	begin_unrest((char *)at);
	if (munmap((char *)unmapped, pages * PAGE))
		_exit(7);
	if (fork_in_unrest())
		return;
	begin_turning(&restless.calm->child, (char *)at + TURNERS * PAGE, true);
	end_turning();
	if (readable((char *)unmapped))
		_exit(20);
	check_and_exit((char *)kept, pages, id);
}

/* Likewise, but memory moves; the child moves it on, and looks whether it is the same, or refused. */
static void fork_runaway(uint64_t at, uint64_t from, uint64_t to, uint64_t onward, size_t pages, uint64_t id)
{
	const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;

	begin_unrest((char *)at);
	if (mremap((char *)from, pages * PAGE, pages * PAGE, flags, (char *)to) == MAP_FAILED)
		_exit(7);
	if (fork_in_unrest())
		return;
	if (mremap((char *)to, pages * PAGE, pages * PAGE, flags, (char *)onward) == MAP_FAILED)
		_exit(7);
	check_and_exit((char *)onward, pages, id);
}

static void settle(void)
{
	if (pthread_create(&restless.hog, NULL, hog, NULL))
		_exit(4);
	restless.calm->parent = true;
	end_turning();
	say("ok");
}

static void calm_down(void)
{
	int status;

	restless.calm->child = true;
	pthread_join(restless.hog, NULL);
	if (waitpid(restless.child, &status, 0) != restless.child)
		_exit(7);
	say(status ? "no a child ended with %#x" : "ok", status);
}

/* ---- commands ---- */

static void result(long rc)
{
	if (rc < 0)
		say("ok errno %d", errno);
	else
		say("ok %ld", rc);
}

static void open_uffd(uint64_t features, bool blocking)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | (blocking ? 0 : O_NONBLOCK));
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) {
		say("no userfaultfd: errno %d", errno);
		return;
	}
	say("ok");
	send_fd(uffd);
}

static void copy(uint64_t at, uint64_t id)
{
	static uint64_t page[WORDS];
	struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)page, .len = PAGE};

	for (size_t i = 0; i < WORDS; i++)
		page[i] = id;
	result(ioctl(uffd, UFFDIO_COPY, &copy));
}

struct move {
	char *from, *to;
	size_t pages;
};

static void *mover(void *arg)
{
	struct move *m = arg;

	mremap(m->from, m->pages * PAGE, m->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m->to);
	return NULL;
}

/* Memory moves away, of which nobody may have heard yet; guards are in its place at once. */
static void leave_guards(uint64_t from, size_t pages, uint64_t to)
{
	static struct move move;
	unsigned char there;
	pthread_t thread;

	move = (struct move){(char *)from, (char *)to, pages};
	if (pthread_create(&thread, NULL, mover, &move))
		_exit(4);
	pthread_detach(thread);
	while (!mincore(move.from, PAGE, &there) || errno != ENOMEM)
		sched_yield();
	if (mmap(move.from, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) !=
	    move.from)
		_exit(7);
	result(madvise(move.from, pages * PAGE, MADV_GUARD_INSTALL_));
}

/* A child, which takes commands on a socket of its own; orphan: it may outlive its parent. */
static void fork_child(bool orphan)
{
	int ends[2];
	pid_t pid, parent = getpid();

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		_exit(7);
	pid = fork();
	if (pid < 0)
		_exit(7);
	if (!pid) {
		if (!orphan)
			end_with(parent);
		close(ends[0]);
		close(control);
		control = ends[1];
		if (uffd >= 0)
			close(uffd);
		uffd = -1;
		return;
	}
	close(ends[1]);
	say("ok %d", pid);
	send_fd(ends[0]);
	close(ends[0]);
}

static void obey_all(void);

static void *fork_thread(void *arg)
{
	pid_t parent = getpid();

	(void)arg;
	fork_child(false);
	if (getpid() != parent) {
		obey_all();
		_exit(0);
	}
	for (;;) /* the child ends with the thread that has made it */
		pause();
}

/* A thread forks, which takes until the event is read; the others go on. */
static void fork_apart(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, fork_thread, NULL))
		_exit(4);
	pthread_detach(thread);
	say("ok");
}

static int heir(void *arg)
{
	(void)arg;
	say("ok %d", (int)getpid());
	obey_all();
	return 0;
}

/* Ends, and leaves all of its memory to another process, which takes the commands from here on. */
static void leave(void)
{
	static char stack[STACK] __attribute__((aligned(4096)));

	if (clone(heir, stack + STACK, CLONE_VM | SIGCHLD, NULL) < 0)
		_exit(7);
	syscall(SYS_exit_group, 0);
}

/* The parent moves without unmapping, since the fork; the child moves other memory to the same place. */
static void fork_rivals(uint64_t at, uint64_t from, uint64_t to, uint64_t other, size_t pages, uint64_t id)
{
	begin_unrest((char *)at);
	if (fork_in_unrest()) {
		if (mremap((char *)from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (char *)to) ==
		    MAP_FAILED)
			_exit(7);
		return;
	}
	if (mremap((char *)other, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)to) == MAP_FAILED)
		_exit(7);
	check_and_exit((char *)from, pages, id);
}

/* The parent moves, and forks; in the child other memory grows to where that was: all zeros there, the data at `to`. */
static void fork_growing(uint64_t at, uint64_t from, uint64_t to, uint64_t other, size_t pages, uint64_t id)
{
	begin_unrest((char *)at);
	if (mremap((char *)from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)to) == MAP_FAILED)
		_exit(7);
	if (fork_in_unrest())
		return;
	if (mremap((char *)other, pages * PAGE, 2 * pages * PAGE, 0) == MAP_FAILED)
		_exit(7);
	for (size_t i = 0; i < pages; i++)
		if (readable((char *)from + i * PAGE) && *(volatile uint64_t *)((char *)from + i * PAGE))
			_exit(22);
	check_and_exit((char *)to, pages, id);
}

/* Each is an event that the thread waits for: it makes the next one as soon as that has been read. */
static void *discard_for_ever(void *page)
{
	while (!madvise(page, PAGE, MADV_DONTNEED))
		;
	_exit(4);
}

static void begin_discarding(char *at, size_t threads)
{
	pthread_t thread;

	for (size_t i = 0; i < threads; i++)
		if (pthread_create(&thread, NULL, discard_for_ever, at + i * PAGE) || pthread_detach(thread))
			_exit(4);
	say("ok");
}

struct checker {
	pthread_t thread;
	char stack[STACK] __attribute__((aligned(4096)));
};

/* Forks children while threads check the same memory; each child checks it too, while more are forked. */
static void forks(int n, uint64_t at, size_t pages, uint64_t id, int threads)
{
	struct walk w = {.at = (char *)at, .pages = pages, .id = id, .order = RANDOM, .together = true};
	static struct checker checkers[MAX_THREADS];
	struct walk *arg = &w;
	uint64_t seed = id;
	int failed = 0;
	pid_t pids[n], parent = getpid();

	w.shuffled = xcalloc(pages, sizeof(size_t));
	for (size_t i = 0; i < pages; i++) {
		size_t j = mix(&seed) % (i + 1);

		w.shuffled[i] = w.shuffled[j];
		w.shuffled[j] = i;
	}
	for (int i = 0; i < threads; i++) {
		pthread_attr_t attr;

		pthread_attr_init(&attr);
		pthread_attr_setstack(&attr, checkers[i].stack, STACK);
		if (pthread_create(&checkers[i].thread, &attr, walk_thread, &arg))
			_exit(4);
	}
	for (int i = 0; i < n; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			_exit(7);
		if (!pids[i]) {
			end_with(parent);
			bad.is = false;
			walk_thread(&arg);
			_exit(bad.is);
		}
	}
	for (int i = 0; i < n; i++) {
		int status;

		if (waitpid(pids[i], &status, 0) < 0 || status)
			failed++;
	}
	for (int i = 0; i < threads; i++)
		pthread_join(checkers[i].thread, NULL);
	free(w.shuffled);
	if (failed)
		found_bad("%d of %d children", failed, n);
	say_found("");
}

static void obey(const char *name, const uint64_t *a)
{
	char *at = (char *)a[0];
	size_t len = a[1] * PAGE;

	if (!strcmp(name, "map")) {
		result(mmap(at, len, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == at ?
			       0 :
			       -1);
	} else if (!strcmp(name, "uffd")) {
		open_uffd(a[0], a[1]);
	} else if (!strcmp(name, "close")) {
		result(close(uffd));
		uffd = -1;
	} else if (!strcmp(name, "register")) {
		struct uffdio_register reg = {.range = {a[0], len}, .mode = UFFDIO_REGISTER_MODE_MISSING};

		result(ioctl(uffd, UFFDIO_REGISTER, &reg));
	} else if (!strcmp(name, "check")) {
		check(a[0], a[1], a[2], (enum order)a[3], (int)a[4], a[5], a[6]);
	} else if (!strcmp(name, "peek")) {
		peek(a[0]);
	} else if (!strcmp(name, "leave_guards")) {
		leave_guards(a[0], a[1], a[2]);
	} else if (!strcmp(name, "peek_guarded")) {
		peek_guarded(a[0]);
	} else if (!strcmp(name, "poke")) {
		for (size_t i = 0; i < a[1] * WORDS; i++)
			((uint64_t *)at)[i] = a[2] + i / WORDS;
		say("ok");
	} else if (!strcmp(name, "copy")) {
		copy(a[0], a[1]);
	} else if (!strcmp(name, "madvise")) {
		result(madvise(at, len, (int)a[2]));
	} else if (!strcmp(name, "munmap")) {
		result(munmap(at, len));
	} else if (!strcmp(name, "mprotect")) {
		result(mprotect(at, len, (int)a[2]));
	} else if (!strcmp(name, "mremap")) {
		result((long)mremap(at, len, a[2] * PAGE, (int)a[3], (void *)a[4]));
	} else if (!strcmp(name, "seal")) {
		result(syscall(462, at, len, 0)); /* mseal(2), Linux 6.10 */
	} else if (!strcmp(name, "mapover")) {
		result(mmap(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at ? 0 : -1);
	} else if (!strcmp(name, "limit")) { /* of address space, in bytes */
		struct rlimit limit;

		getrlimit(RLIMIT_AS, &limit);
		limit.rlim_cur = a[0];
		result(setrlimit(RLIMIT_AS, &limit));
	} else if (!strcmp(name, "mapped")) {
		unsigned char vec;

		result(!mincore(at, PAGE, &vec) || errno != ENOMEM);
	} else if (!strcmp(name, "regrow")) {
		regrow(a[0], a[1], a[2], a[3], a[4]);
	} else if (!strcmp(name, "late")) {
		late(a[0], a[1], a[2], a[3], a[4]);
	} else if (!strcmp(name, "churn")) {
		churn(a[0], a[1], a[2], a[3], a[4], a[5], (int)a[6]);
	} else if (!strcmp(name, "swarm")) {
		swarm(a[0], a[1], a[2], a[3], a[4], a[5], (int)a[6]);
	} else if (!strcmp(name, "race")) {
		race(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
	} else if (!strcmp(name, "fork")) {
		fork_child(a[0]);
	} else if (!strcmp(name, "fork_apart")) {
		fork_apart();
	} else if (!strcmp(name, "leave")) {
		leave();
	} else if (!strcmp(name, "discards")) {
		begin_discarding(at, a[1]);
	} else if (!strcmp(name, "drop")) {
		close(uffd);
		uffd = -1;
		say("ok");
	} else if (!strcmp(name, "restless")) {
		fork_restless(a[0], a[1], a[2], a[3], a[4]);
	} else if (!strcmp(name, "rivals")) {
		fork_rivals(a[0], a[1], a[2], a[3], a[4], a[5]);
	} else if (!strcmp(name, "growing")) {
		fork_growing(a[0], a[1], a[2], a[3], a[4], a[5]);
	} else if (!strcmp(name, "runaway")) {
		fork_runaway(a[0], a[1], a[2], a[3], a[4], a[5]);
	} else if (!strcmp(name, "settle")) {
		settle();
	} else if (!strcmp(name, "calm")) {
		calm_down();
	} else if (!strcmp(name, "forks")) {
		forks((int)a[0], a[1], a[2], a[3], (int)a[4]);
	} else {
		say("no such command: %s", name);
	}
}

/* Until nobody gives commands any more. */
static void obey_all(void)
{
	char line[256];
	size_t used = 0;

	for (;;) {
		uint64_t a[8] = {0};
		char *end, *word;

		/* one byte at a time: what follows may be for a child that is forked meanwhile */
		if (used == sizeof(line) || read(control, line + used, 1) != 1)
			return;
		if (line[used++] != '\n')
			continue;
		line[used - 1] = 0;
		used = 0;
		word = strtok(line, " ");
		for (int i = 0; i < 8 && word; i++) {
			char *number = strtok(NULL, " ");

			if (!number)
				break;
			a[i] = strtoull(number, &end, 0);
		}
		if (word)
			obey(word, a);
	}
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_NODEFER};

	if (argc != 2)
		return 2;
	control = atoi(argv[1]);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	obey_all();
}
