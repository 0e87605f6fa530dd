/*
 * Threads that run on small stacks in the middle of memory that is in use, as those of goroutines are: `small_stacks GO`.
 *
 * Says "ready" when all stand.  When the file GO is there they end, and the memory around their stacks is checked: exit
 * code 0 when no byte is another.  The first thread is one of them.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define THREADS 3
#define STACK 2048 /* enough for nanosleep and access, once they are linked; and no signal comes */
#define AROUND 65536
#define FILLING(i) ((unsigned char)((i) * 31 + (i) / 4096 + 1))

static const char *go;
static unsigned char *memory[THREADS];
static ucontext_t outside[THREADS], inside[THREADS];

/* Half of the time in user mode, half asleep in the kernel. */
static void work(void)
{
	while (access(go, F_OK)) {
		struct timespec pause = {.tv_nsec = 100000};

		for (volatile int i = 0; i < 100000; i++)
			;
		nanosleep(&pause, NULL);
	}
}

static void *run(void *argument)
{
	size_t n = (size_t)argument;

	getcontext(&inside[n]);
	inside[n].uc_stack.ss_sp = memory[n] + AROUND;
	inside[n].uc_stack.ss_size = STACK;
	inside[n].uc_link = &outside[n];
	makecontext(&inside[n], work, 0);
	swapcontext(&outside[n], &inside[n]);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	int wrong = 0;

	go = argv[argc - 1];
	for (size_t n = 0; n < THREADS; n++) {
		memory[n] = malloc(2 * AROUND + STACK);
		for (size_t i = 0; i < 2 * AROUND + STACK; i++)
			memory[n][i] = FILLING(i);
	}
	access(go, F_OK); /* linked now, for which there is no room later */
	nanosleep(&(struct timespec){0}, NULL);
	for (size_t n = 1; n < THREADS; n++)
		pthread_create(&threads[n], NULL, run, (void *)n);
	puts("ready");
	fflush(stdout);
	run((void *)0);
	for (size_t n = 1; n < THREADS; n++)
		pthread_join(threads[n], NULL);
	for (size_t n = 0; n < THREADS; n++)
		for (size_t i = 0; i < 2 * AROUND + STACK; i++)
			if ((i < AROUND || i >= AROUND + STACK) && memory[n][i] != FILLING(i) && wrong++ < 10)
				printf("thread %zu: byte %zd from its stack is %d, not %d\n", n, (ssize_t)i - AROUND,
				       memory[n][i], FILLING(i));
	return wrong != 0;
}
