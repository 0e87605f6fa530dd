/* Counts, slowly until there is a file "go" here: `counter LINES`. What it prints depends on nothing but LINES. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long lines = argc > 1 ? atol(argv[1]) : 0;
	uint64_t state = 1;

	for (long i = 0; i < lines; i++) {
		struct timespec ts = { 0, 5000000 };

		state = state * 6364136223846793005u + 1442695040888963407u;
		printf("%ld %016lx\n", i, state);
		fflush(stdout);
		if (access("go", F_OK))
			while (nanosleep(&ts, &ts))
				;
	}
	return 42;
}
