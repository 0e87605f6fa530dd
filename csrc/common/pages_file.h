/*
 * Reading pages files.  A page counts as present only if the file contains all 4096 bytes of it.
 *
 * A file may be truncated after its size has been checked.  In a mapping, pages after the end of the file then can't be read,
 * but the page that contains the end can: the kernel fills it with zeros (mmap(2)).  So a reader checks the file's size after
 * it has copied a page; for a mapping, also before.  Truncation changes the size before it clears bytes (truncate_setsize() in
 * mm/truncate.c), so a page is valid if the file was still long enough after the copy.
 */
#ifndef LAZYPAGES_PAGES_FILE_H
#define LAZYPAGES_PAGES_FILE_H

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#define LP_FILE_PAGE UINT64_C(4096)

/*
 * The number of pages at offset, up to nr_pages, that the file contains.  Called twice per fault, hence lseek, which takes
 * 120 ns; fstat takes 200.  No code here uses the file position.
 */
static inline uint64_t lp_pages_held(int fd, uint64_t offset, uint64_t nr_pages)
{
	off_t size = lseek(fd, 0, SEEK_END);
	uint64_t held;

	if (size < 0 || (uint64_t)size < offset)
		return 0;
	held = ((uint64_t)size - offset) / LP_FILE_PAGE;
	return held < nr_pages ? held : nr_pages;
}

/*
 * Reads pages at offset.  Returns the number of pages, from the first one on, that the file contains and that are readable;
 * -errno if the first one is not readable.
 *
 * A read of many pages may fail because of one of them: FUSE and network file systems fail the whole request.  Then the
 * pages are read one by one.
 */
static inline int64_t lp_pages_read(int fd, void *buffer, uint64_t offset, uint64_t nr_pages)
{
	uint64_t size = nr_pages * LP_FILE_PAGE, done = 0;
	int error = 0;

	while (done < size) {
		uint64_t want = error ? LP_FILE_PAGE - done % LP_FILE_PAGE : size - done;
		ssize_t got = pread(fd, (char *)buffer + done, want, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0) {
			error = errno;
			if (want > LP_FILE_PAGE)
				continue;
			break;
		}
		if (!got) {
			error = 0;
			break;
		}
		done += (uint64_t)got;
	}
	if (error && done < LP_FILE_PAGE)
		return -error;
	return (int64_t)lp_pages_held(fd, offset, done / LP_FILE_PAGE);
}

#endif
