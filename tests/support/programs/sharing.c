/*
 * Shared memory that is written in every way, and compared with a private copy: sharing KIND...  KIND: anon,
 * cut (anonymous memory, mapped but for its end), memfd, open (a memfd that nobody maps), sysv, or detached (System V,
 * attached by nobody). For each file `step-N` in the working directory it writes once in
 * each way, and makes `done-N`. At `check` it compares all bytes, lets its child write, compares again, and writes
 * `verdict`.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 1024 /* all of them mapped; the file of a memfd ends in the middle of the last one */
#define SIZE (PAGES * PAGE)
#define CUT 100 /* pages */
#define TIMES 3 /* each way, in each step */

enum kind { ANON, MEMFD, SYSV };
enum way { OWN, CHILD, GRANDCHILD, VM_WRITE, HOLE, UNMAPPED, DROPPED, BACK, BY_FILE, SPLICED, WAYS };

struct object {
	enum kind kind;
	int fd, id, pages;
	int away; /* mapped only while it is used */
	unsigned char *map, *model;
};
struct order {
	int object, page, version;
};

static struct object objects[4];
static int nr_objects, orders[2], answers[2];

static void *checked(void *result, const char *what)
{
	if (result == (void *)-1)
		err(1, "%s", what);
	return result;
}

static void attach(struct object *o)
{
	if (o->kind == ANON && o->fd < 0)
		o->map = checked(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), "mmap");
	else if (o->kind == ANON || o->kind == MEMFD)
		o->map = checked(mmap(NULL, o->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, o->fd, 0), "mmap");
	else
		o->map = checked(shmat(o->id, NULL, 0), "shmat");
}

/* Anonymous memory can be mapped once more by the magic link only. */
static void detach(struct object *o)
{
	char path[80];

	if (o->kind == ANON) {
		snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", (long)o->map, (long)o->map + o->pages * PAGE);
		o->fd = open(path, O_RDWR);
		if (o->fd < 0)
			err(1, "%s", path);
	}
	if (o->kind == SYSV ? shmdt(o->map) : munmap(o->map, o->pages * PAGE))
		err(1, "munmap");
}

static void make(struct object *o, const char *kind)
{
	o->fd = o->id = -1;
	o->pages = PAGES;
	o->away = !strcmp(kind, "open") || !strcmp(kind, "detached");
	o->kind = !strcmp(kind, "anon") || !strcmp(kind, "cut")	 ? ANON :
		  !strcmp(kind, "memfd") || !strcmp(kind, "open") ? MEMFD :
								    SYSV;
	if (o->kind == MEMFD) {
		o->fd = memfd_create("sharing", 0);
		if (ftruncate(o->fd, SIZE - 1000))
			err(1, "ftruncate");
	} else if (o->kind != ANON) {
		o->id = shmget(IPC_PRIVATE, SIZE, IPC_CREAT | 0600);
	}
	attach(o);
	if (!strcmp(kind, "cut")) {
		memset(o->map, 1, SIZE);
		o->pages -= CUT;
		munmap(o->map + o->pages * PAGE, CUT * PAGE);
	}
	o->model = malloc(SIZE);
}

static void content(unsigned char *bytes, int object, int page, int version)
{
	memset(bytes, 1 + (page * 7 + version * 31 + object) % 255, PAGE);
	memcpy(bytes, &version, sizeof(version));
	memcpy(bytes + PAGE - sizeof(page), &page, sizeof(page));
}

static void obey(void)
{
	struct order order;

	for (int object = 0; object < nr_objects; object++)
		if (objects[object].away)
			detach(objects + object);
	while (read(orders[0], &order, sizeof(order)) == sizeof(order)) {
		struct object *o = objects + order.object;

		if (o->away)
			attach(o);
		content(o->map + order.page * PAGE, order.object, order.page, order.version);
		if (o->away)
			detach(o);
		if (write(answers[1], "", 1) != 1)
			break;
	}
	_exit(0);
}

static void by_child(int object, int page, int version)
{
	struct order order = { object, page, version };
	char answer;

	if (write(orders[1], &order, sizeof(order)) != sizeof(order) || read(answers[0], &answer, 1) != 1)
		err(1, "the child");
}

static void put(int object, int page, int version, enum way way)
{
	struct object *o = objects + object;
	unsigned char bytes[PAGE], *model = o->model + page * PAGE, *place = o->map + page * PAGE;
	int file = o->kind == MEMFD && page < o->pages - 1, ends[2], status;

	content(bytes, object, page, version);
	if (way == HOLE) {
		memset(model, 0, PAGE);
		if (file ? fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE) :
			   madvise(place, PAGE, MADV_REMOVE))
			err(1, "hole");
		return;
	}
	if (way == BACK) { /* not changed in the end */
		memset(place, 255, PAGE);
		memcpy(place, model, PAGE);
		return;
	}
	memcpy(model, bytes, PAGE);
	if (way == CHILD) {
		by_child(object, page, version);
	} else if (way == GRANDCHILD) {
		pid_t pid = fork();

		if (!pid) {
			detach(o);
			attach(o);
			memcpy(o->map + page * PAGE, bytes, PAGE);
			_exit(0);
		}
		waitpid(pid, &status, 0);
	} else if (way == VM_WRITE) {
		struct iovec from = { bytes, PAGE }, to = { place, PAGE };

		process_vm_writev(getpid(), &from, 1, &to, 1, 0);
	} else if (way == UNMAPPED) {
		detach(o);
		attach(o);
		if (o->kind == ANON) {
			close(o->fd);
			o->fd = -1;
		}
		memcpy(o->map + page * PAGE, bytes, PAGE);
	} else if (way == DROPPED) {
		madvise(o->map, o->pages * PAGE, MADV_PAGEOUT);
		madvise(o->map, o->pages * PAGE, MADV_DONTNEED);
		memcpy(place, bytes, PAGE);
	} else if (way == BY_FILE && file) {
		if (pwrite(o->fd, bytes, PAGE, page * PAGE) != PAGE)
			err(1, "pwrite");
	} else if (way == SPLICED && file) {
		off_t at = page * PAGE;

		if (pipe(ends) || write(ends[1], bytes, PAGE) != PAGE || splice(ends[0], NULL, o->fd, &at, PAGE, 0) != PAGE)
			err(1, "splice");
		close(ends[0]);
		close(ends[1]);
	} else {
		memcpy(place, bytes, PAGE);
	}
}

static void step(int number)
{
	for (int object = 0; object < nr_objects; object++) {
		if (objects[object].away)
			attach(objects + object);
		for (int way = 0; way < WAYS; way++)
			for (int i = 0; i < TIMES; i++)
				put(object, (number * 331 + way * 41 + i * 13) % objects[object].pages, number, way);
		put(object, objects[object].pages - 1, number, OWN); /* also behind the end of the file */
		if (objects[object].away)
			detach(objects + object);
	}
}

static int is_right(FILE *verdict)
{
	int right = 1;

	for (int object = 0; object < nr_objects; object++) {
		if (objects[object].away)
			attach(objects + object);
		for (int page = 0; page < objects[object].pages; page++) {
			if (memcmp(objects[object].map + page * PAGE, objects[object].model + page * PAGE, PAGE)) {
				fprintf(verdict, "object %d, page %d is wrong\n", object, page);
				right = 0;
			}
		}
		if (objects[object].away)
			detach(objects + object);
	}
	return right;
}

static void check(void)
{
	FILE *verdict = fopen("verdict.new", "w");
	int right = is_right(verdict);

	for (int object = 0; object < nr_objects; object++)
		if (!objects[object].away)
			put(object, 5, 99, CHILD);
	if (is_right(verdict) && right)
		fprintf(verdict, "right\n");
	fclose(verdict);
	rename("verdict.new", "verdict");
}

int main(int argc, char **argv)
{
	char name[20], done[20];

	for (; nr_objects + 1 < argc; nr_objects++)
		make(objects + nr_objects, argv[nr_objects + 1]);
	if (pipe(orders) || pipe(answers))
		err(1, "pipe");
	if (!fork())
		obey();
	for (int object = 0; object < nr_objects; object++) {
		for (int page = 0; page < objects[object].pages; page++)
			put(object, page, 0, OWN);
		if (objects[object].away)
			detach(objects + object);
	}
	for (int number = 0;;) {
		snprintf(name, sizeof(name), "step-%d", number);
		snprintf(done, sizeof(done), "done-%d", number);
		if (!access(name, F_OK)) {
			if (number)
				step(number);
			close(open(done, O_CREAT | O_WRONLY, 0600));
			number++;
		} else if (!access("check", F_OK)) {
			check();
			return 0;
		}
		usleep(1000);
	}
}
