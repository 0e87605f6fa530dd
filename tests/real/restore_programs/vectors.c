/*
 * vectors FILE GO: threads that hold all they know in vector registers and thread-local data while they
 * take turns on a lock; when the file GO is there, each writes what it still knows to FILE.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREADS 4

static __thread uint64_t own[512];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t started;
static volatile int go;
static uint64_t turns, sums[THREADS];
static FILE *out;

__attribute__((target("avx512f"))) static void hold_wide(uint64_t *block, volatile int *flag)
{
	__asm__ volatile("vmovdqu64 (%0), %%zmm0\n\tvmovdqu64 64(%0), %%zmm15\n\tvmovdqu64 128(%0), %%zmm16\n\t"
			 "vmovdqu64 192(%0), %%zmm31\n\tkmovw 256(%0), %%k1\n\tkmovw 264(%0), %%k7\n\t"
			 "1: pause\n\tcmpl $0, (%1)\n\tje 1b\n\t"
			 "vmovdqu64 %%zmm0, (%0)\n\tvmovdqu64 %%zmm15, 64(%0)\n\tvmovdqu64 %%zmm16, 128(%0)\n\t"
			 "vmovdqu64 %%zmm31, 192(%0)\n\tkmovw %%k1, 256(%0)\n\tkmovw %%k7, 264(%0)\n\tvzeroupper"
			 :
			 : "r"(block), "r"(flag)
			 : "memory", "xmm0", "xmm15", "xmm16", "xmm31", "k1", "k7");
}

__attribute__((target("avx"))) static void hold_half(uint64_t *block, volatile int *flag)
{
	__asm__ volatile("vmovdqu (%0), %%ymm0\n\tvmovdqu 64(%0), %%ymm7\n\tvmovdqu 128(%0), %%ymm8\n\t"
			 "vmovdqu 192(%0), %%ymm15\n\t"
			 "1: pause\n\tcmpl $0, (%1)\n\tje 1b\n\t"
			 "vmovdqu %%ymm0, (%0)\n\tvmovdqu %%ymm7, 64(%0)\n\tvmovdqu %%ymm8, 128(%0)\n\t"
			 "vmovdqu %%ymm15, 192(%0)\n\tvzeroupper"
			 :
			 : "r"(block), "r"(flag)
			 : "memory", "xmm0", "xmm7", "xmm8", "xmm15");
}

static void *worker(void *argument)
{
	uintptr_t number = (uintptr_t)argument;
	uint64_t block[34];
	long double x87 = 1.0L / (3 + number);

	for (size_t i = 0; i < 512; i++)
		own[i] = number * 1000000 + i;
	for (size_t i = 0; i < 34; i++)
		block[i] = (number + 1) * 0x9e3779b97f4a7c15ULL + i;
	block[32] = 0xa5a5 + number;
	block[33] = 0x5a5a - number;
	pthread_barrier_wait(&started);
	if (number % 2) { /* works on */
		do {
			pthread_mutex_lock(&lock);
			turns++;
			sums[number]++;
			pthread_mutex_unlock(&lock);
			x87 = x87 * 3 / 3;
		} while (!go); /* once at least: the undisturbed run may find the file at once */
	} else if (__builtin_cpu_supports("avx512f")) {
		hold_wide(block, &go);
	} else {
		hold_half(block, &go);
	}
	pthread_barrier_wait(&started);
	pthread_mutex_lock(&lock);
	fprintf(out, "thread %zu:", (size_t)number);
	for (size_t i = 0; i < 34; i++)
		fprintf(out, " %llx", (unsigned long long)(number % 2 ? 0 : block[i]));
	for (size_t i = 0; i < 512; i++)
		if (own[i] != number * 1000000 + i)
			fprintf(out, " own[%zu] is %llx", i, (unsigned long long)own[i]);
	fprintf(out, " %.10Lf\n", x87);
	pthread_mutex_unlock(&lock);
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	uint64_t sum = 0;

	if (argc < 3 || !(out = fopen(argv[1], "w")) || pthread_barrier_init(&started, NULL, THREADS + 1))
		return 1;
	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, worker, (void *)i))
			return 1;
	pthread_barrier_wait(&started);
	fprintf(out, "ready\n");
	fflush(out);
	while (access(argv[2], F_OK))
		usleep(1000);
	go = 1;
	pthread_barrier_wait(&started);
	for (size_t i = 0; i < THREADS; i++) {
		pthread_join(threads[i], NULL);
		sum += sums[i];
	}
	fprintf(out, "%s\n", sum == turns && turns ? "no turn was lost" : "turns were lost");
	return fclose(out) ? 1 : 0;
}
