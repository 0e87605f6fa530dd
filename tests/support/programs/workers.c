/*
 * Threads that share a lock, each with thread-local data and sums in AVX registers: `workers ROUNDS
 * MICROSECONDS GO`. They rest after each round until there is a file of the name GO. What it prints depends on nothing
 * but ROUNDS.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREADS 4

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static long rounds, rest, turn, handled;
static const char *go;
static uint64_t total;
static __thread uint64_t mine;
static __thread char name[16];

/* Many rounds without a store: what they sum up lives in the registers alone. */
__attribute__((target("avx2"))) static uint64_t sum_in_registers(uint64_t seed)
{
	__m256i a = _mm256_set_epi64x(seed, seed + 1, seed + 2, seed + 3), b = _mm256_slli_epi64(a, 7), sum = a;
	uint64_t out[4];

	for (int i = 0; i < 20000; i++) {
		sum = _mm256_add_epi64(_mm256_xor_si256(sum, b), a);
		__asm__ volatile("" : "+x"(sum), "+x"(a), "+x"(b));
	}
	memcpy(out, &sum, sizeof(out));
	return out[0] ^ out[1] * 3 ^ out[2] * 5 ^ out[3] * 7;
}

static void *work(void *argument)
{
	long number = (long)argument;

	snprintf(name, sizeof(name), "worker-%ld", number);
	pthread_setname_np(pthread_self(), name);
	for (long i = 0; i < rounds; i++) {
		mine = mine * 31 + sum_in_registers(i * THREADS + number);
		pthread_mutex_lock(&lock);
		while (turn % THREADS != number)
			pthread_cond_wait(&turned, &lock);
		turn++;
		total = total * 17 + mine;
		pthread_cond_broadcast(&turned);
		pthread_mutex_unlock(&lock);
		if (rest && access(go, F_OK))
			usleep(rest);
	}
	pthread_mutex_lock(&lock);
	while (turn % THREADS != number)
		pthread_cond_wait(&turned, &lock);
	turn++;
	printf("%s %016lx\n", name, mine);
	fflush(stdout);
	pthread_cond_broadcast(&turned);
	pthread_mutex_unlock(&lock);
	return NULL;
}

static void count(int signal)
{
	(void)signal;
	handled++;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	struct sigaction action = { .sa_handler = count, .sa_flags = SA_RESTART };

	if (argc < 4)
		return 2;
	rounds = atol(argv[1]);
	rest = atol(argv[2]);
	go = argv[3];
	sigaction(SIGUSR1, &action, NULL);
	printf("started\n");
	fflush(stdout);
	for (long i = 0; i < THREADS; i++)
		pthread_create(threads + i, NULL, work, (void *)i);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	printf("total %016lx\n", total);
	return 0;
}
