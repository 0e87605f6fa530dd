#define _GNU_SOURCE
#include "uffd_ops.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "common/linux_compat.h"
#include "common/page.h"
#include "common/probe.h"

static enum lp_outcome outcome_of(int error)
{
	switch (error) {
	case 0:
		return LP_DONE;
	case EEXIST:
		return LP_PRESENT;
	case EAGAIN:
		return LP_CHANGING;
	case ENOMEM:
	case EINTR:
		return LP_LATER;
	case ESRCH:
	case ENOSPC:
		return LP_TASK_GONE;
	case ENOENT:
		return LP_UNREGISTERED;
	default:
		return LP_FAILED;
	}
}

/* done: the bytes that the ioctl has filled in, or a negative error. */
static struct lp_result result_of(int rc, int64_t done)
{
	struct lp_result result = {0};

	if (rc)
		result.error = done < 0 ? (int)-done : errno;
	if (done > 0)
		result.nr_pages = (uint64_t)done >> LP_PAGE_SHIFT;
	result.outcome = outcome_of(result.error);
	return result;
}

struct lp_result lp_uffd_copy(int uffd, uint64_t addr, const void *src, uint64_t nr_pages, bool quiet)
{
	struct uffdio_copy copy = {
		.dst = addr,
		.src = (uintptr_t)src,
		.len = nr_pages << LP_PAGE_SHIFT,
		.mode = quiet ? UFFDIO_COPY_MODE_DONTWAKE : 0,
	};
	int rc = ioctl(uffd, UFFDIO_COPY, &copy);

	return result_of(rc, copy.copy);
}

struct lp_result lp_uffd_zero(int uffd, uint64_t addr, bool quiet)
{
	struct uffdio_zeropage zero = {
		.range = {.start = addr, .len = LP_PAGE_SIZE},
		.mode = quiet ? UFFDIO_ZEROPAGE_MODE_DONTWAKE : 0,
	};
	int rc = ioctl(uffd, UFFDIO_ZEROPAGE, &zero);

	return result_of(rc, zero.zeropage);
}

struct lp_result lp_uffd_poison(int uffd, uint64_t addr, uint64_t nr_pages)
{
	struct uffdio_poison poison = {.range = {.start = addr, .len = nr_pages << LP_PAGE_SHIFT}};
	int rc = ioctl(uffd, UFFDIO_POISON, &poison);

	return result_of(rc, poison.updated);
}

void lp_uffd_wake(int uffd, uint64_t addr, uint64_t nr_pages)
{
	struct uffdio_range range = {.start = addr, .len = nr_pages << LP_PAGE_SHIFT};

	ioctl(uffd, UFFDIO_WAKE, &range);
}

enum lp_outcome lp_uffd_probe(int uffd, const void *unreadable, uint64_t addr)
{
	return outcome_of(lp_probe(uffd, unreadable, addr));
}

struct lp_result lp_uffd_probe_range(int uffd, uint64_t start, uint64_t end)
{
	int error = lp_probe_range(uffd, start, end);

	return (struct lp_result){.outcome = outcome_of(error), .error = error};
}

int lp_uffd_open(uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd >= 0 && ioctl(uffd, UFFDIO_API, &api)) {
		int saved = errno;

		close(uffd);
		errno = saved;
		return -1;
	}
	return uffd;
}

bool lp_uffd_register(int uffd, const void *start, uint64_t nr_pages)
{
	struct uffdio_register registered = {
		.range = {.start = (uintptr_t)start, .len = nr_pages << LP_PAGE_SHIFT},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return !ioctl(uffd, UFFDIO_REGISTER, &registered);
}
