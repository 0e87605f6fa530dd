/*
 * Waits with a stack pointer that is the first byte of a page, as that of one program in 256 is by chance.
 *
 * SIGUSR2: says whether each of the pages that it has filled is right, and ends.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGES 2048
#define WORDS 512

static uint64_t *memory;

static void check(int signo)
{
	int right = signo == SIGUSR2;

	for (uint64_t word = 0; word < PAGES * WORDS; word++)
		right = right && memory[word] == word * 31;
	dprintf(1, "%s\n", right ? "right" : "wrong");
	_exit(0);
}

int main(void)
{
	memory = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (uint64_t word = 0; word < PAGES * WORDS; word++)
		memory[word] = word * 31;
	signal(SIGUSR2, check);
	dprintf(1, "ready\n");
	for (;;) {
		long number = SYS_pause;

		asm volatile("mov %%rsp, %%rbx\n\t"
			     "and $-4096, %%rsp\n\t"
			     "syscall\n\t"
			     "mov %%rbx, %%rsp"
			     : "+a"(number)
			     :
			     : "rbx", "rcx", "r11", "memory", "cc");
	}
}
