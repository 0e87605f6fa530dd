/* counter FILE: writes 0 to 199 into it, slowly; exits with 42. */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int fd = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;

	if (fd < 0)
		return 1;
	for (int i = 0; i < 200; i++) {
		const struct timespec pause = { .tv_nsec = 10000000 };

		if (dprintf(fd, "%d\n", i) < 0)
			return 2;
		nanosleep(&pause, NULL);
	}
	return 42;
}
