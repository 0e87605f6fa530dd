/* counter FILE: writes 0 to 199 into it, slowly, and the second half not before there is FILE.go; exits with 42. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int fd = argc > 1 ? open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
	char go[4096];

	if (fd < 0)
		return 1;
	snprintf(go, sizeof(go), "%s.go", argv[1]);
	for (int i = 0; i < 200; i++) {
		const struct timespec pause = { .tv_nsec = 10000000 };

		if (dprintf(fd, "%d\n", i) < 0)
			return 2;
		do
			nanosleep(&pause, NULL);
		while (i == 99 && access(go, F_OK) && errno == ENOENT); /* another user may not look */
	}
	return 42;
}
