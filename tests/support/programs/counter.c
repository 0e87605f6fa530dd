/*
 * Counts and says so, slowly until there is a file of the name GO: `counter LINES MICROSECONDS GO`. What it prints
 * depends on nothing but LINES.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long lines = argc > 3 ? atol(argv[1]) : 0, pause = argc > 3 ? atol(argv[2]) : 0;
	uint64_t state = 1;

	for (long i = 0; i < lines; i++) {
		struct timespec ts = { pause / 1000000, pause % 1000000 * 1000 };

		state = state * 6364136223846793005u + 1442695040888963407u;
		printf("%ld %016lx\n", i, state);
		fflush(stdout);
		if (pause && access(argv[3], F_OK))
			while (nanosleep(&ts, &ts))
				;
	}
	return 0;
}
