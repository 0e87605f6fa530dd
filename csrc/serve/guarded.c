#define _GNU_SOURCE
#include "guarded.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/fs.h>

#include "common/linux_compat.h"
#include "uffd_ops.h"

int lp_guarded_scan(int fd, uint64_t category, uint64_t start, uint64_t end, struct lp_range *found)
{
	for (;;) {
		struct page_region region;
		struct pm_scan_arg arg = {
			.size = sizeof(arg),
			.start = start,
			.end = end,
			.vec = (uintptr_t)&region,
			.vec_len = 1,
			.category_mask = category,
			.return_mask = category,
		};
		int nr = ioctl(fd, PAGEMAP_SCAN, &arg);

		if (nr < 0 && errno == EINTR)
			continue;
		if (nr < 0)
			return -errno;
		*found = nr ? (struct lp_range){region.start, region.end} : (struct lp_range){end, end};
		return 0;
	}
}

/* Which category PAGEMAP_SCAN has for the guard at this page of ours; 0: none. */
static uint64_t category_of(const void *guard)
{
	uint64_t at = (uintptr_t)guard, category = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	struct lp_range found;

	if (fd < 0)
		return 0;
	if (!lp_guarded_scan(fd, PAGE_IS_GUARD, at, at + LP_PAGE_SIZE, &found) && found.start == at)
		category = PAGE_IS_GUARD;
	/* Linux 6.13 and 6.14. A page that is swapped out would not be copied to either: the kernel says EEXIST. */
	else if (!lp_guarded_scan(fd, PAGE_IS_SWAPPED, at, at + LP_PAGE_SIZE, &found) && found.start == at)
		category = PAGE_IS_SWAPPED;
	close(fd);
	return category;
}

/* Whether a copy puts a page over this guard. Where that can't be tried it is expected. */
static bool overwrites(void *guard, const void *page)
{
	int fd = lp_uffd_open(0);
	bool yes = true;

	if (fd >= 0 && lp_uffd_register(fd, guard, 1))
		yes = lp_uffd_copy(fd, (uintptr_t)guard, page, 1, false).outcome != LP_PRESENT;
	if (fd >= 0)
		close(fd);
	return yes;
}

void lp_guarded_init(struct lp_guarded *g)
{
	char *two = mmap(NULL, 2 * LP_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*g = (struct lp_guarded){0};
	pthread_mutex_init(&g->lock, NULL);
	for (size_t i = 0; i < LP_GUARDED_OPEN; i++)
		g->kept[i].fd = -1;
	if (two == MAP_FAILED)
		return;
	two[LP_PAGE_SIZE] = 1;
	if (!madvise(two, LP_PAGE_SIZE, MADV_GUARD_INSTALL)) {
		g->category = category_of(two);
		if (!overwrites(two, two + LP_PAGE_SIZE))
			g->category = 0;
	}
	munmap(two, 2 * LP_PAGE_SIZE);
	/* A first one is always held, so that there is one to be had when descriptors have run out. */
	if (g->category)
		g->kept[0].fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}

void lp_guarded_end(struct lp_guarded *g)
{
	for (size_t i = 0; i < LP_GUARDED_OPEN; i++)
		if (g->kept[i].fd >= 0)
			close(g->kept[i].fd);
	pthread_mutex_destroy(&g->lock);
}

/* Of those not in use, an empty place or the one that was not used for longest; LP_GUARDED_OPEN: none. (locked) */
static size_t free_place(const struct lp_guarded *g, bool open)
{
	size_t best = LP_GUARDED_OPEN;

	for (size_t i = 0; i < LP_GUARDED_OPEN; i++) {
		if (g->kept[i].users || (open && g->kept[i].fd < 0))
			continue;
		if (best == LP_GUARDED_OPEN || g->kept[i].used < g->kept[best].used)
			best = i;
	}
	return best;
}

static void vacate(struct lp_guarded *g, size_t place)
{
	if (g->kept[place].fd >= 0)
		close(g->kept[place].fd);
	g->kept[place].fd = -1;
	g->kept[place].owner = NULL;
	g->kept[place].used = 0;
}

/*
 * What is opened belongs to the memory that the process has at that moment (fs/proc/task_mmu.c, pagemap_open): was it the right
 * process, and has it not left that memory behind by an execve?  *sure: the second is certain.
 */
static int open_tables(const struct lp_guarded_task *task, bool *sure)
{
	char path[32];
	enum lp_outcome outcome;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)task->pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	outcome = lp_uffd_probe(task->uffd, task->unreadable, LP_ANYWHERE);
	if (outcome == LP_TASK_GONE || (task->pidfd >= 0 && syscall(SYS_pidfd_send_signal, task->pidfd, 0, NULL, 0))) {
		close(fd);
		return -ESRCH;
	}
	*sure = outcome != LP_CHANGING;
	return fd;
}

int lp_guarded_take(struct lp_guarded *g, const struct lp_guarded_task *task)
{
	bool sure = false;
	size_t place;
	int fd;

	pthread_mutex_lock(&g->lock);
	for (size_t i = 0; i < LP_GUARDED_OPEN; i++) {
		if (g->kept[i].owner != task->owner)
			continue;
		g->kept[i].users++;
		g->kept[i].used = ++g->uses;
		fd = g->kept[i].fd;
		goto out;
	}
	fd = open_tables(task, &sure);
	if ((fd == -EMFILE || fd == -ENFILE) && (place = free_place(g, true)) < LP_GUARDED_OPEN) {
		vacate(g, place);
		fd = open_tables(task, &sure);
	}
	if (fd >= 0 && sure && (place = free_place(g, false)) < LP_GUARDED_OPEN) {
		vacate(g, place);
		g->kept[place].owner = task->owner;
		g->kept[place].fd = fd;
		g->kept[place].users = 1;
		g->kept[place].used = ++g->uses;
	}
out:
	pthread_mutex_unlock(&g->lock);
	return fd;
}

void lp_guarded_give(struct lp_guarded *g, const void *owner, int fd)
{
	bool kept = false;

	pthread_mutex_lock(&g->lock);
	for (size_t i = 0; i < LP_GUARDED_OPEN && !kept; i++)
		if (g->kept[i].owner == owner && g->kept[i].fd == fd) {
			g->kept[i].users--;
			kept = true;
		}
	pthread_mutex_unlock(&g->lock);
	if (!kept)
		close(fd);
}

void lp_guarded_forget(struct lp_guarded *g, const void *owner)
{
	pthread_mutex_lock(&g->lock);
	for (size_t i = 0; i < LP_GUARDED_OPEN; i++)
		if (g->kept[i].owner == owner) {
			/* a descriptor that is ours stays ours, see lp_guarded_init */
			g->kept[i].owner = NULL;
			g->kept[i].used = 0;
		}
	pthread_mutex_unlock(&g->lock);
}
