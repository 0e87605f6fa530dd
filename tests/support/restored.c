/*
 * A restore without CRIU: tasks that register memory of their own with
 * userfaultfd and hand it to the daemon as `criu restore --lazy-pages` does.
 *
 *   restored TASKS PAGES       forks the tasks, prints their pids, reads commands from stdin:
 *     connect PATH   each task registers PAGES pages and sends pid and uffd
 *     dead PID       says that PID is a zombie
 *     finish         says that the restore is finished
 *     close          closes the connection
 *     touch N        each task touches its first N pages, then waits for the next command
 *     exit           each task ends with status 0, whatever it misses
 *     exec           each task becomes another program, which does nothing
 *     check          each task checks all its pages and ends, with status 0 if every byte is right
 *     wait           waits for the tasks; prints how each ended, as a shell would number it
 *
 * Page i of task t holds 512 words (t << 32 | i) + word number; t counts from 0.
 * A command that is done is answered with a line "ok".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define BASE 0x100000000000ull
#define WORDS 512

struct task {
	pid_t pid;
	int command, answer; /* the parent's ends */
};

static void die(const char *what)
{
	perror(what);
	_exit(3);
}

static int open_uffd(size_t pages)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
							       UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP };
	struct uffdio_register reg = { .range = { BASE, pages << 12 }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
	if (mmap((void *)BASE, pages << 12, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0) == MAP_FAILED)
		die("mmap");
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	return uffd;
}

static void send_task(int sock, int uffd)
{
	int32_t pid = getpid();
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &uffd, sizeof(int));
	if (write(sock, &pid, 4) != 4 || sendmsg(sock, &msg, 0) != 1)
		die("send");
}

static void check_page(uint64_t task, uint64_t page)
{
	const uint64_t *words = (const uint64_t *)(BASE + (page << 12));

	for (uint64_t w = 0; w < WORDS; w++)
		if (words[w] != (task << 32 | page) + w) {
			fprintf(stderr, "task %lu page %lu word %lu: %lx\n", task, page, w, words[w]);
			_exit(1);
		}
}

static void run_task(uint64_t task, size_t pages, int sock, int commands, int answers)
{
	char command;
	uint32_t n;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (read(commands, &command, 1) == 1) {
		switch (command) {
		case 's': {
			int uffd = open_uffd(pages);

			send_task(sock, uffd);
			close(uffd);
			break;
		}
		case 't':
			if (read(commands, &n, 4) != 4)
				_exit(3);
			for (uint32_t i = 0; i < n; i++)
				check_page(task, i);
			break;
		case 'e':
			_exit(0);
		case 'x':
			execl("/bin/sleep", "sleep", "60", NULL);
			_exit(3);
		case 'c':
			for (size_t i = 0; i < pages; i++)
				check_page(task, (i * 7919 + 13 * task) % pages);
			_exit(0);
		}
		if (write(answers, "k", 1) != 1)
			_exit(3);
	}
	_exit(3);
}

static void tell(struct task *tasks, int nr, const void *message, size_t size, int wait)
{
	char answer;

	for (int i = 0; i < nr; i++) {
		if (write(tasks[i].command, message, size) != (ssize_t)size)
			die("command");
		if (wait == 1 && read(tasks[i].answer, &answer, 1) != 1)
			die("answer");
	}
	for (int i = 0; wait == 2 && i < nr; i++)
		if (read(tasks[i].answer, &answer, 1) != 1)
			die("answer");
}

int main(int argc, char **argv)
{
	int nr = argc > 2 ? atoi(argv[1]) : 0, sock = socket(AF_UNIX, SOCK_STREAM, 0);
	size_t pages = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	struct task *tasks = calloc((size_t)nr + 1, sizeof(*tasks));
	char line[256];

	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < nr; i++) {
		int command[2], answer[2];

		if (pipe2(command, O_CLOEXEC) || pipe2(answer, O_CLOEXEC))
			die("pipe");
		tasks[i].pid = fork();
		if (!tasks[i].pid) {
			for (int j = 0; j < i; j++) {
				close(tasks[j].command);
				close(tasks[j].answer);
			}
			run_task((uint64_t)i, pages, sock, command[0], answer[1]);
		}
		close(command[0]);
		close(answer[1]);
		tasks[i].command = command[1];
		tasks[i].answer = answer[0];
		printf("%d%c", tasks[i].pid, i + 1 < nr ? ' ' : '\n');
	}
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "connect ", 8)) {
			struct sockaddr_un addr = { .sun_family = AF_UNIX };

			snprintf(addr.sun_path, sizeof(addr.sun_path), "%.100s", line + 8);
			if (connect(sock, (struct sockaddr *)&addr, sizeof(addr)))
				die("connect");
			tell(tasks, nr, "s", 1, 1);
		} else if (!strncmp(line, "dead ", 5)) {
			int32_t pid = -atoi(line + 5);

			if (write(sock, &pid, 4) != 4)
				die("write");
		} else if (!strcmp(line, "finish")) {
			uint32_t word = 0x52535446;

			if (write(sock, &word, 4) != 4)
				die("write");
		} else if (!strcmp(line, "close")) {
			/* the tasks hold it too */
			shutdown(sock, SHUT_RDWR);
			close(sock);
		} else if (!strncmp(line, "touch ", 6)) {
			char message[5] = "t";
			uint32_t n = (uint32_t)atoi(line + 6);

			memcpy(message + 1, &n, 4);
			tell(tasks, nr, message, 5, 2);
		} else if (!strcmp(line, "check")) {
			tell(tasks, nr, "c", 1, 0);
		} else if (!strcmp(line, "exit")) {
			tell(tasks, nr, "e", 1, 0);
		} else if (!strcmp(line, "exec")) {
			tell(tasks, nr, "x", 1, 0);
		} else if (!strcmp(line, "wait")) {
			for (int i = 0; i < nr; i++) {
				int status;

				waitpid(tasks[i].pid, &status, 0);
				printf("%d ", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
			}
			printf("\n");
			fflush(stdout);
			continue;
		}
		printf("ok\n");
		fflush(stdout);
	}
	return 0;
}
