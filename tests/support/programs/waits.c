/*
 * Threads that wait, each in another system call: `waits MILLISECONDS`. Prints "ready" when all do. On SIGUSR2 it says which
 * of them have come back (none may have, unless the time is up), wakes those that wait for an event and, with a second
 * argument, waits for those that wait for the time. What each call came back with, and whether too early, is checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long milliseconds;
static int word, fds[2], full[2], child;

static struct timespec duration(void)
{
	return (struct timespec){ milliseconds / 1000, milliseconds % 1000 * 1000000 };
}

static struct timespec now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts;
}

static struct timespec until(void)
{
	struct timespec ts = now(), more = duration();

	ts.tv_sec += more.tv_sec + (ts.tv_nsec + more.tv_nsec) / 1000000000;
	ts.tv_nsec = (ts.tv_nsec + more.tv_nsec) % 1000000000;
	return ts;
}

/* Each comes back with 0 when the call had the result that it must have, else with its errno (-1: a wrong result). */
static int outcome(long result, long expected, int error)
{
	if (result == expected && (result >= 0 || errno == error))
		return 0;
	return result < 0 ? errno : -1;
}

static int sleeps(void)
{
	struct timespec ts = duration();
	return outcome(syscall(SYS_nanosleep, &ts, NULL), 0, 0);
}

static int sleeps_with_rest(void)
{
	struct timespec ts = duration(), rest;
	return outcome(nanosleep(&ts, &rest), 0, 0);
}

static int sleeps_on_a_clock(void)
{
	struct timespec ts = duration(), rest;
	int error = clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, &rest);
	return error;
}

static int sleeps_until(void)
{
	struct timespec ts = until(), rest;
	return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, &rest);
}

static int polls(void)
{
	struct pollfd one = { .fd = fds[0] };
	return outcome(poll(&one, 1, milliseconds), 0, 0);
}

static int polls_precisely(void)
{
	struct timespec ts = duration();
	return outcome(ppoll(NULL, 0, &ts, NULL), 0, 0);
}

static int selects(void)
{
	struct timeval tv = { milliseconds / 1000, milliseconds % 1000 * 1000 };
	return outcome(select(0, NULL, NULL, NULL, &tv), 0, 0);
}

static int selects_precisely(void)
{
	struct timespec ts = duration();
	return outcome(pselect(0, NULL, NULL, NULL, &ts, NULL), 0, 0);
}

static int waits_on_a_futex(void)
{
	struct timespec ts = duration();
	int never = 0;
	return outcome(syscall(SYS_futex, &never, FUTEX_WAIT, 0, &ts, NULL, 0), -1, ETIMEDOUT);
}

static int waits_on_a_condition(void)
{
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
	struct timespec ts = until();

	pthread_mutex_lock(&mutex);
	return pthread_cond_clockwait(&condition, &mutex, CLOCK_MONOTONIC, &ts) == ETIMEDOUT ? 0 : -1;
}

static int awaits_a_signal(void)
{
	struct timespec ts = duration();
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGIO);
	return outcome(sigtimedwait(&set, NULL, &ts), -1, EAGAIN);
}

static int reads(void)
{
	char byte;
	return outcome(read(fds[0], &byte, 1), 1, 0);
}

static int writes(void)
{
	char page[4096] = { 0 };
	return outcome(write(full[1], page, sizeof(page)), sizeof(page), 0);
}

static int waits_on_a_word(void)
{
	return outcome(syscall(SYS_futex, &word, FUTEX_WAIT, 0, NULL, NULL, 0), 0, 0);
}

static int pauses(void)
{
	return outcome(pause(), -1, EINTR); /* by the handler of SIGUSR1, after the go */
}

static int suspends(void)
{
	sigset_t set;

	sigfillset(&set);
	sigdelset(&set, SIGUSR1);
	return outcome(sigsuspend(&set), -1, EINTR);
}

static int waits_for_a_child(void)
{
	return outcome(waitpid(child, NULL, 0), child, 0);
}

static int polls_for_ever(void)
{
	struct pollfd one = { .fd = full[0], .events = POLLHUP };
	return outcome(poll(&one, 1, -1), 1, 0);
}

static struct waiter {
	const char *name;
	int (*wait)(void);
	int timed;
	volatile int result, done, early;
	pthread_t thread;
	volatile pid_t tid;
} waiters[] = {
#define TIMED(call) { .name = #call, .wait = call, .timed = 1 }
#define UNTIMED(call) { .name = #call, .wait = call }
	TIMED(sleeps), TIMED(sleeps_with_rest), TIMED(sleeps_on_a_clock), TIMED(sleeps_until), TIMED(polls),
	TIMED(polls_precisely), TIMED(selects), TIMED(selects_precisely), TIMED(waits_on_a_futex),
	TIMED(waits_on_a_condition), TIMED(awaits_a_signal), UNTIMED(reads), UNTIMED(writes), UNTIMED(waits_on_a_word),
	UNTIMED(pauses), UNTIMED(suspends), UNTIMED(waits_for_a_child), UNTIMED(polls_for_ever),
};
#define COUNT (sizeof(waiters) / sizeof(*waiters))

static void *run(void *argument)
{
	struct waiter *waiter = argument;
	struct timespec begin = now(), end;

	waiter->tid = gettid();
	waiter->result = waiter->wait();
	end = now();
	waiter->early = waiter->timed && (end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec <
						 milliseconds * 1000000;
	waiter->done = 1;
	return NULL;
}

static int is_asleep(pid_t tid)
{
	char path[64], state = 0;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
	file = fopen(path, "r");
	if (!file || fscanf(file, "%*d %*s %c", &state) != 1)
		state = 0;
	if (file)
		fclose(file);
	return state == 'S';
}

static void join(struct waiter *waiter)
{
	pthread_join(waiter->thread, NULL);
	printf("%s: %s%s\n", waiter->name, waiter->result ? strerrorname_np(waiter->result) ?: "wrong" : "good",
	       waiter->early ? ", too early" : "");
}

static void ignore(int signo)
{
	(void)signo;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = ignore };
	static char rubbish[65536];
	sigset_t set;
	size_t i;

	milliseconds = argc > 1 ? atol(argv[1]) : 0;
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGIO);
	sigprocmask(SIG_BLOCK, &set, NULL);
	if (pipe(fds) || pipe(full) || write(full[1], rubbish, sizeof(rubbish)) != sizeof(rubbish))
		return 1;
	child = fork();
	if (!child) {
		close(full[0]);
		close(full[1]);
		for (;;)
			pause();
	}
	for (i = 0; i < COUNT; i++)
		pthread_create(&waiters[i].thread, NULL, run, &waiters[i]);
	for (i = 0; i < COUNT; i++)
		while (!waiters[i].tid || (!waiters[i].done && !is_asleep(waiters[i].tid)))
			usleep(1000);
	printf("ready\n");
	fflush(stdout);
	sigdelset(&set, SIGIO);
	if (sigwaitinfo(&set, NULL) != SIGUSR2)
		printf("main: %s\n", strerrorname_np(errno));
	for (i = 0; i < COUNT; i++)
		if (waiters[i].done && !(waiters[i].timed && argc > 2))
			printf("%s: has come back\n", waiters[i].name);
	if (write(fds[1], "x", 1) != 1 || read(full[0], rubbish, sizeof(rubbish)) <= 0)
		return 1;
	word = 1;
	syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
	kill(child, SIGKILL);
	for (i = 0; i < COUNT; i++)
		if (waiters[i].wait == pauses || waiters[i].wait == suspends)
			pthread_kill(waiters[i].thread, SIGUSR1);
	for (i = 0; i < COUNT; i++)
		if (waiters[i].wait == writes)
			join(&waiters[i]);
	close(full[1]); /* a hang-up for polls_for_ever */
	for (i = 0; i < COUNT; i++)
		if (waiters[i].wait != writes && (argc > 2 || !waiters[i].timed))
			join(&waiters[i]);
	fflush(stdout);
	_exit(0);
}
