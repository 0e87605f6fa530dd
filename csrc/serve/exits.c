#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/pidfd.h>

#include "common/linux_compat.h"

int lp_exit_status(int pidfd)
{
	struct pidfd_info info = {.mask = PIDFD_INFO_EXIT};

	if (ioctl(pidfd, PIDFD_GET_INFO, &info) || !(info.mask & PIDFD_INFO_EXIT))
		return -1;
	return info.exit_code;
}

#define STATUS 7

static pid_t start_and_end(void)
{
	pid_t pid = vfork();

	if (!pid)
		_exit(STATUS);
	return pid;
}

bool lp_exit_status_works(void)
{
	pid_t pid = start_and_end();
	bool works = false;
	int pidfd;

	if (pid < 0)
		return false;
	pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	if (pidfd >= 0) {
		works = lp_exit_status(pidfd) == STATUS << 8;
		close(pidfd);
	}
	return works;
}
