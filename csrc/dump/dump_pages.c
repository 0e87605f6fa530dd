#define _GNU_SOURCE
#include "dump_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/fs.h>

#include "common/linux_compat.h"
#include "common/pages_file.h"
#include "common/write_all.h"

#define MAX_IOVS 512
#define PARENT_PAGES 16 /* read from a parent at once */

_Static_assert(LP_PAGE_WPALLOWED == PAGE_IS_WPALLOWED && LP_PAGE_WRITTEN == PAGE_IS_WRITTEN && LP_PAGE_FILE == PAGE_IS_FILE &&
		       LP_PAGE_PRESENT == PAGE_IS_PRESENT && LP_PAGE_SWAPPED == PAGE_IS_SWAPPED &&
		       LP_PAGE_PFNZERO == PAGE_IS_PFNZERO && LP_PAGE_HUGE == PAGE_IS_HUGE &&
		       LP_PAGE_SOFT_DIRTY == PAGE_IS_SOFT_DIRTY && LP_PAGE_GUARD == PAGE_IS_GUARD,
	       "categories of PAGEMAP_SCAN");

/*
 * With more room the kernel works in several steps. When the last step reaches the end, walk_end is left as the step
 * before set it, so that the next call would find the same pages again (observed with Linux 6.18).
 */
#define SCAN_MAX 512

/* An entry of /proc/<pid>/pagemap (Documentation/admin-guide/mm/pagemap.rst). */
#define ENTRY_PFN ((1ULL << 55) - 1) /* 0 without CAP_SYS_ADMIN */
#define ENTRY_SOFT_DIRTY (1ULL << 55)
#define ENTRY_EXCLUSIVE (1ULL << 56)
#define ENTRY_FILE (1ULL << 61) /* also set for the huge zero page (observed with Linux 6.1, 6.12, 6.18) */
#define ENTRY_SWAPPED (1ULL << 62)
#define ENTRY_PRESENT (1ULL << 63)
#define ENTRIES 4096 /* read at once: 32 KiB */

/* The PFN of the zero page; 0: not visible to us. */
static uint64_t zero_pfn(void)
{
	volatile char *page = mmap(NULL, LP_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	if (page != MAP_FAILED && fd >= 0) {
		(void)*page;
		if (pread(fd, &entry, sizeof(entry), (uintptr_t)page / LP_PAGE_SIZE * sizeof(entry)) != sizeof(entry))
			entry = 0;
	}
	if (fd >= 0)
		close(fd);
	if (page != MAP_FAILED)
		munmap((void *)page, LP_PAGE_SIZE);
	return entry & ENTRY_PRESENT ? entry & ENTRY_PFN : 0;
}

static uint64_t entry_categories(uint64_t entry, uint64_t zero)
{
	uint64_t has = entry & ENTRY_SOFT_DIRTY ? LP_PAGE_SOFT_DIRTY : 0;

	if (entry & ENTRY_SWAPPED)
		return has | LP_PAGE_SWAPPED;
	if (!(entry & ENTRY_PRESENT))
		return has;
	has |= LP_PAGE_PRESENT;
	if (entry & ENTRY_FILE)
		return has | LP_PAGE_FILE | LP_PAGE_PFNZERO;
	if (zero && (entry & ENTRY_PFN) == zero)
		return has | LP_PAGE_PFNZERO;
	if (!zero && !(entry & ENTRY_EXCLUSIVE))
		return has | LP_PAGE_SOFT_DIRTY; /* possibly the zero page, whose reads set no soft-dirty bit */
	return has;
}

/* lp_scan_pages() for kernels without PAGEMAP_SCAN (before Linux 6.7); finds only the categories in `known`. */
static int scan_entries(int pagemap_fd, const struct lp_scan *scan, uint64_t *next, uint64_t end, struct lp_run *out,
			size_t room, size_t *count)
{
	const uint64_t known = LP_PAGE_FILE | LP_PAGE_PRESENT | LP_PAGE_SWAPPED | LP_PAGE_PFNZERO | LP_PAGE_SOFT_DIRTY;
	const uint64_t selects = scan->required | scan->excluded | scan->any;
	const uint64_t zero = zero_pfn();
	static __thread uint64_t entries[ENTRIES];

	if (scan->protect)
		return -EPERM;
	if ((selects & ~known) || (scan->wanted & LP_PAGE_GUARD))
		return -EINVAL;
	while (*next < end) {
		size_t nr = (end - *next) / LP_PAGE_SIZE;
		ssize_t got = pread(pagemap_fd, entries, (nr < ENTRIES ? nr : ENTRIES) * sizeof(*entries),
				    *next / LP_PAGE_SIZE * sizeof(*entries));

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got < 0 ? -errno : -EIO;
		for (size_t i = 0; i < got / sizeof(*entries); i++, *next += LP_PAGE_SIZE) {
			uint64_t has = entry_categories(entries[i], zero);
			struct lp_run *last = *count ? out + *count - 1 : NULL;

			if ((has & scan->required) != scan->required || (has & scan->excluded) ||
			    (scan->any && !(has & scan->any)))
				continue;
			has &= scan->wanted;
			if (last && last->end == *next && last->flags == has) {
				last->end += LP_PAGE_SIZE;
				continue;
			}
			if (*count == room)
				return 0;
			out[(*count)++] = (struct lp_run){ *next, *next + LP_PAGE_SIZE, has };
		}
	}
	return 0;
}

int lp_scan_pages(int pagemap_fd, const struct lp_scan *scan, uint64_t *next, uint64_t end, struct lp_run *out,
		  size_t room, size_t *count)
{
	*count = 0;
	while (*next < end && *count < room) {
		struct pm_scan_arg arg = {
			.size = sizeof(arg),
			.flags = scan->protect ? PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC : 0,
			.start = *next,
			.end = end,
			.vec = (uintptr_t)(out + *count),
			.vec_len = room - *count < SCAN_MAX ? room - *count : SCAN_MAX,
			.category_inverted = scan->excluded,
			.category_mask = scan->required | scan->excluded,
			.category_anyof_mask = scan->any,
			.return_mask = scan->wanted,
		};
		int found = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);

		if (found < 0) {
			if (errno == EINTR)
				continue;
			if (errno == ENOTTY)
				return scan_entries(pagemap_fd, scan, next, end, out, room, count);
			return -errno;
		}
		*count += found;
		*next = arg.walk_end;
	}
	return 0;
}

void lp_append_run(struct lp_run *out, size_t room, size_t *count, uint64_t start, uint64_t end, uint64_t flags)
{
	struct lp_run *last = *count && *count <= room ? out + *count - 1 : NULL;

	if (last && last->end == start && last->flags == flags) {
		last->end = end;
		return;
	}
	if (*count < room)
		out[*count] = (struct lp_run){ start, end, flags };
	(*count)++;
}

static int has_data(const struct lp_extent *extent)
{
	return extent->source != LP_SOURCE_REMOTE && extent->source != LP_SOURCE_LOST;
}

void lp_label_runs(struct lp_run *runs, size_t nr_runs, uint64_t with, uint64_t without, uint64_t unchanged,
		   uint64_t changed)
{
	for (size_t r = 0; r < nr_runs; r++) {
		uint64_t has = runs[r].flags;

		runs[r].flags = (has & with) == with && !(has & without) ? unchanged : changed;
	}
}

uint64_t lp_count_run_pages(const struct lp_run *runs, size_t nr_runs, uint64_t flags)
{
	uint64_t size = 0;

	for (size_t r = 0; r < nr_runs; r++)
		if ((runs[r].flags & flags) == flags)
			size += runs[r].end - runs[r].start;
	return size / LP_PAGE_SIZE;
}

size_t lp_pin_pages(const struct lp_run *runs, size_t nr_runs, const uint64_t *pages, size_t nr_pages,
		    struct lp_run *out, size_t room)
{
	size_t count = 0, p = 0;

	for (size_t r = 0; r < nr_runs; r++) {
		uint64_t at = runs[r].start, flags = runs[r].flags;
		uint64_t pinned = flags & ~LP_LAZY ? flags & ~LP_LAZY : LP_PRESENT;

		for (; p < nr_pages && pages[p] < runs[r].end; p++) {
			if (pages[p] < at)
				continue;
			if (at < pages[p])
				lp_append_run(out, room, &count, at, pages[p], flags);
			at = pages[p] + LP_PAGE_SIZE;
			lp_append_run(out, room, &count, pages[p], at, pinned);
		}
		if (at < runs[r].end)
			lp_append_run(out, room, &count, at, runs[r].end, flags);
	}
	return count;
}

size_t lp_check_parent(const struct lp_run *runs, size_t nr_runs, const struct lp_extent *held, size_t nr_held,
		       int present, struct lp_run *out, size_t room)
{
	size_t count = 0, h = 0;

	for (size_t r = 0; r < nr_runs; r++) {
		uint64_t at = runs[r].start, end = runs[r].end, flags = runs[r].flags;
		uint64_t without = flags & ~LP_PARENT;

		if (present || !(without & LP_LAZY))
			without |= LP_PRESENT;
		while ((flags & LP_PARENT) && at < end) {
			uint64_t until = end;

			while (h < nr_held && (!has_data(held + h) || lp_extent_end(held + h) <= at))
				h++;
			if (h < nr_held && held[h].start <= at) {
				if (lp_extent_end(held + h) < until)
					until = lp_extent_end(held + h);
				lp_append_run(out, room, &count, at, until, flags);
			} else {
				if (h < nr_held && held[h].start < until)
					until = held[h].start;
				lp_append_run(out, room, &count, at, until, without);
			}
			at = until;
		}
		if (at < end)
			lp_append_run(out, room, &count, at, end, flags);
	}
	return count;
}

size_t lp_mark_unchanged(const struct lp_run *runs, size_t nr_runs, const struct lp_run *others, size_t nr_others,
			 int lazy, struct lp_run *out, size_t room)
{
	size_t count = 0, o = 0;

	for (size_t r = 0; r < nr_runs; r++) {
		uint64_t at = runs[r].start, end = runs[r].end, flags = runs[r].flags;
		uint64_t unchanged = (lazy ? flags & LP_LAZY : 0) | LP_PARENT;

		while (at < end) {
			uint64_t until = end;

			while (o < nr_others && (!(others[o].flags & LP_PARENT) || others[o].end <= at))
				o++;
			if (o < nr_others && others[o].start <= at) {
				if (others[o].end < until)
					until = others[o].end;
				lp_append_run(out, room, &count, at, until, unchanged);
			} else {
				if (o < nr_others && others[o].start < until)
					until = others[o].start;
				lp_append_run(out, room, &count, at, until, flags);
			}
			at = until;
		}
	}
	return count;
}

/* The pages [start, end) last read from a parent. `next`: index of the extent to continue the search from. */
struct parent_pages {
	const struct lp_parent *parent;
	size_t next;
	uint64_t start, end;
	unsigned char bytes[PARENT_PAGES * LP_PAGE_SIZE];
};

/* The bytes of a page in a parent; NULL if they are not there. Addresses must come in ascending order. */
static const unsigned char *parent_page(struct parent_pages *p, uint64_t address)
{
	const struct lp_extent *held = p->parent->held;
	uint64_t skip, nr;
	int64_t got;

	if (address >= p->start && address < p->end)
		return p->bytes + (address - p->start);
	while (p->next < p->parent->nr_held && (!has_data(held + p->next) || lp_extent_end(held + p->next) <= address))
		p->next++;
	held += p->next;
	if (p->next == p->parent->nr_held || held->start > address || p->parent->levels[held->source] < 0)
		return NULL;
	skip = address - held->start;
	nr = (lp_extent_end(held) - address) / LP_PAGE_SIZE;
	got = lp_pages_read(p->parent->levels[held->source], p->bytes, held->offset + skip,
			    nr < PARENT_PAGES ? nr : PARENT_PAGES);
	if (got <= 0)
		return NULL;
	p->start = address;
	p->end = address + (uint64_t)got * LP_PAGE_SIZE;
	return p->bytes;
}

static int is_zero(const unsigned char *page)
{
	uint64_t first;

	memcpy(&first, page, sizeof(first));
	return first == 0 && memcmp(page, page + 8, LP_PAGE_SIZE - 8) == 0;
}

/* Writes one buffer while the other is being read: a frozen task waits for the slower of the two, not for the sum. */
struct writer {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	const unsigned char *bytes;
	size_t size; /* 0: idle */
	int fd, durable, started, ended, rc;
};

/* Starts writeback, so that the fsync has less to wait for. Files that can't (a memfd for instance) are no error. */
static void begin_writeback(int fd, size_t size)
{
	off_t end = lseek(fd, 0, SEEK_CUR);

	if (end >= (off_t)size)
		sync_file_range(fd, end - size, size, SYNC_FILE_RANGE_WRITE);
}

static void *write_on(void *argument)
{
	struct writer *w = argument;

	pthread_mutex_lock(&w->lock);
	for (;;) {
		int rc;

		while (!w->size && !w->ended)
			pthread_cond_wait(&w->changed, &w->lock);
		if (!w->size)
			break;
		pthread_mutex_unlock(&w->lock);
		rc = lp_write_all(w->fd, w->bytes, w->size);
		if (!rc && w->durable)
			begin_writeback(w->fd, w->size);
		pthread_mutex_lock(&w->lock);
		w->rc = rc;
		w->size = 0;
		pthread_cond_signal(&w->changed);
		if (rc)
			break;
	}
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

/* On return everything handed over before is written. */
static int hand_over(struct writer *w, const unsigned char *bytes, size_t size)
{
	int rc;

	if (!w->started) {
		rc = pthread_create(&w->thread, NULL, write_on, w);
		if (rc)
			return -rc;
		w->started = 1;
	}
	pthread_mutex_lock(&w->lock);
	while (w->size)
		pthread_cond_wait(&w->changed, &w->lock);
	rc = w->rc;
	if (!rc) {
		w->bytes = bytes;
		w->size = size;
		pthread_cond_signal(&w->changed);
	}
	pthread_mutex_unlock(&w->lock);
	return rc;
}

static int end_writer(struct writer *w)
{
	if (!w->started)
		return 0;
	pthread_mutex_lock(&w->lock);
	w->ended = 1;
	pthread_cond_signal(&w->changed);
	pthread_mutex_unlock(&w->lock);
	pthread_join(w->thread, NULL);
	return w->rc;
}

/* Reads iov[0..nr) into buffer. Returns the bytes read, up to the first page that can't be read, or -errno. */
static ssize_t read_pieces(const struct lp_copy *copy, unsigned char *buffer, const struct iovec *iov, size_t nr)
{
	struct iovec here = { .iov_base = buffer };
	size_t done = 0;

	if (copy->mem_fd < 0) {
		for (size_t i = 0; i < nr; i++)
			here.iov_len += iov[i].iov_len;
		ssize_t got = process_vm_readv(copy->pid, &here, 1, iov, nr, 0);

		return got < 0 ? -errno : got;
	}
	for (size_t i = 0; i < nr; i++) {
		for (size_t part = 0; part < iov[i].iov_len;) {
			ssize_t got = pread(copy->mem_fd, buffer + done, iov[i].iov_len - part,
					    (off_t)(uintptr_t)iov[i].iov_base + part);

			if (got < 0 && errno == EINTR)
				continue;
			if (got <= 0)
				return done ? (ssize_t)done : got < 0 ? (errno == EIO ? -EFAULT : -errno) : -EFAULT;
			part += got;
			done += got;
		}
	}
	return done;
}

static int copy_pages(const struct lp_copy *copy, const struct lp_run *runs, size_t nr_runs, struct lp_cursor *cursor,
		      uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out, uint64_t *written,
		      struct writer *writer)
{
	unsigned char *buffer = copy->buffer;
	struct parent_pages parent;
	uint64_t looked = 0;

	parent.parent = copy->parent;
	parent.next = parent.start = parent.end = 0;
	while (cursor->run < nr_runs && looked < max_pages) {
		struct iovec iov[MAX_IOVS];
		struct lp_cursor ahead = *cursor;
		size_t nr = 0, size = 0, kept = 0, place = 0;
		ssize_t got;
		int rc;

		/* Gather the pieces to read next; a run that is not copied ends them. */
		while (ahead.run < nr_runs && nr < MAX_IOVS && size < copy->buffer_size) {
			const struct lp_run *run = runs + ahead.run;
			uint64_t part = run->end - run->start - ahead.offset;

			if (!(run->flags & LP_PRESENT)) {
				if (nr)
					break;
				lp_append_run(out, room, nr_out, run->start, run->end, run->flags);
				ahead = (struct lp_cursor){ ahead.run + 1, 0 };
				*cursor = ahead;
				continue;
			}
			if (part > copy->buffer_size - size)
				part = copy->buffer_size - size;
			iov[nr++] = (struct iovec){ (void *)(copy->base + run->start + ahead.offset), part };
			size += part;
			ahead.offset += part;
			if (run->start + ahead.offset == run->end)
				ahead = (struct lp_cursor){ ahead.run + 1, 0 };
		}
		if (!nr)
			continue;

		got = read_pieces(copy, buffer, iov, nr);
		if (got < 0 && got != -EFAULT)
			return got;
		if (got < 0)
			got = 0;
		got -= got % LP_PAGE_SIZE;
		if (got == 0) {
			/* The first page can't be read. */
			if (!copy->drop_missing)
				return -EFAULT;
			cursor->offset += LP_PAGE_SIZE;
			if (runs[cursor->run].start + cursor->offset == runs[cursor->run].end)
				*cursor = (struct lp_cursor){ cursor->run + 1, 0 };
			looked++;
			continue;
		}

		/* Label each page and move the ones to be written together at the start of the buffer. */
		while (place < (size_t)got) {
			const struct lp_run *run = runs + cursor->run;
			uint64_t address = run->start + cursor->offset;
			unsigned char *page = buffer + place;
			const unsigned char *old = copy->parent ? parent_page(&parent, address) : NULL;

			if (copy->drop_zero && is_zero(page)) {
				/* No entry: the restore leaves such pages zero. */
			} else if (old && memcmp(old, page, LP_PAGE_SIZE) == 0) {
				lp_append_run(out, room, nr_out, address, address + LP_PAGE_SIZE,
				       run->flags & LP_LAZY ? copy->same_lazy : LP_PARENT);
			} else {
				if (kept != place)
					memcpy(buffer + kept, page, LP_PAGE_SIZE);
				kept += LP_PAGE_SIZE;
				lp_append_run(out, room, nr_out, address, address + LP_PAGE_SIZE, run->flags);
			}
			place += LP_PAGE_SIZE;
			cursor->offset += LP_PAGE_SIZE;
			if (address + LP_PAGE_SIZE == run->end)
				*cursor = (struct lp_cursor){ cursor->run + 1, 0 };
		}
		if (kept) {
			rc = hand_over(writer, buffer, kept);
			if (rc)
				return rc;
			buffer = copy->buffer + (buffer == copy->buffer ? copy->buffer_size : 0);
		}
		if (*nr_out > room)
			return -ENOBUFS;
		looked += got / LP_PAGE_SIZE;
		*written += kept / LP_PAGE_SIZE;
	}
	return *nr_out > room ? -ENOBUFS : 0;
}

int lp_copy_pages(const struct lp_copy *copy, const struct lp_run *runs, size_t nr_runs, struct lp_cursor *cursor,
		  uint64_t max_pages, struct lp_run *out, size_t room, size_t *nr_out, uint64_t *written)
{
	struct writer writer = { .fd = copy->pages_fd, .durable = copy->durable };
	int rc, ended;

	pthread_mutex_init(&writer.lock, NULL);
	pthread_cond_init(&writer.changed, NULL);
	rc = copy_pages(copy, runs, nr_runs, cursor, max_pages, out, room, nr_out, written, &writer);
	ended = end_writer(&writer);
	pthread_cond_destroy(&writer.changed);
	pthread_mutex_destroy(&writer.lock);
	return rc ? rc : ended;
}
