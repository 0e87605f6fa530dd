#define _GNU_SOURCE
#include "exits.h"

#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Linux 6.13, the exit code 6.15; older headers don't have it.  Its first version: newer kernels take that, too. */
struct info {
	uint64_t mask, cgroupid;
	uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
	int32_t exit_code;
};
#define GET_INFO _IOWR(0xff, 11, struct info)
#define INFO_EXIT (UINT64_C(1) << 3)

int lp_exit_status(int pidfd)
{
	struct info info = {.mask = INFO_EXIT};

	if (ioctl(pidfd, GET_INFO, &info) || !(info.mask & INFO_EXIT))
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
