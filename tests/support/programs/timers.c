/*
 * Timers of timer_create with gaps between their ids: signals to the process, to a thread, none. Prints "ready", ends when
 * both signals have come often enough; the one that is far away must not have come.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static volatile int taken[4];
static volatile pid_t thread;

static void handler(int signo, siginfo_t *info, void *context)
{
	int number = signo - SIGRTMIN;

	(void)context;
	if (info->si_code == SI_TIMER && info->si_value.sival_int == 1000 + number && (number != 2 || gettid() == thread))
		taken[number]++;
}

static void *sleeper(void *unused)
{
	(void)unused;
	thread = gettid();
	for (;;)
		pause();
	return NULL;
}

static timer_t make(clockid_t clock, int notify, int number, const struct itimerspec *spec)
{
	struct sigevent event = { .sigev_notify = notify, .sigev_signo = SIGRTMIN + number };
	timer_t timer;

	event.sigev_value.sival_int = 1000 + number;
	if (notify == SIGEV_THREAD_ID)
		event._sigev_un._tid = thread;
	if (timer_create(clock, &event, &timer) || timer_settime(timer, 0, spec, NULL))
		_exit(1);
	return timer;
}

int main(void)
{
	const struct itimerspec often = { { 0, 20000000 }, { 0, 20000000 } }, late = { { 700, 5 }, { 1000, 0 } };
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct itimerspec left;
	timer_t gone[3], distant;
	pthread_t id;
	int before[4];

	for (int i = 0; i < 4; i++)
		sigaction(SIGRTMIN + i, &action, NULL);
	pthread_create(&id, NULL, sleeper, NULL);
	while (!thread)
		usleep(1000);
	gone[0] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, &late);
	make(CLOCK_MONOTONIC, SIGEV_SIGNAL, 1, &often);
	gone[1] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, &late);
	gone[2] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, &late);
	make(CLOCK_REALTIME, SIGEV_THREAD_ID, 2, &often);
	distant = make(CLOCK_BOOTTIME, SIGEV_SIGNAL, 3, &late);
	make(CLOCK_PROCESS_CPUTIME_ID, SIGEV_NONE, 0, &late);
	for (int i = 0; i < 3; i++)
		timer_delete(gone[i]);
	printf("ready\n");
	fflush(stdout);
	while (access("go", F_OK))
		usleep(1000);
	memcpy(before, (void *)taken, sizeof(before));
	while (taken[1] < before[1] + 5 || taken[2] < before[2] + 5)
		usleep(1000);
	if (timer_gettime(distant, &left) || taken[3])
		return 2;
	printf("%ld %ld %s\n", left.it_interval.tv_sec, left.it_interval.tv_nsec,
	       left.it_value.tv_sec > 0 && left.it_value.tv_sec < 1000 ? "left" : "wrong");
	return 0;
}
