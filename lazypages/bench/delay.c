/*
 * A link with a delay, between clients and a server on this machine.
 *
 *   delay --status-fd N --listen PORT --to PORT --ns NS
 *
 * Delivers all data NS nanoseconds after it was sent, in order, at any rate.  For each direction of each connection one
 * thread receives data and its time, and another one sends it when it is due.  (Not every kernel has `tc netem`.)
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define LARGEST (256u << 10) /* bytes received at a time, at most */

struct piece {
	struct piece *next;
	uint64_t due;
	size_t size; /* 0: end of the connection */
	char data[];
};

struct direction {
	int from, to;
	pthread_mutex_t lock;
	pthread_cond_t some;
	struct piece *first, **last;
};

static uint64_t delay;

static void put(struct direction *d, struct piece *piece)
{
	pthread_mutex_lock(&d->lock);
	*d->last = piece;
	d->last = &piece->next;
	pthread_cond_signal(&d->some);
	pthread_mutex_unlock(&d->lock);
}

static struct piece *get(struct direction *d)
{
	struct piece *piece;

	pthread_mutex_lock(&d->lock);
	while (!d->first)
		pthread_cond_wait(&d->some, &d->lock);
	piece = d->first;
	d->first = piece->next;
	if (!d->first)
		d->last = &d->first;
	pthread_mutex_unlock(&d->lock);
	return piece;
}

static void *take(void *arg)
{
	static __thread char buffer[LARGEST];
	struct direction *d = arg;
	ssize_t size;

	do {
		struct piece *piece;

		size = read(d->from, buffer, sizeof(buffer));
		if (size < 0)
			size = 0; /* a reset counts as an end */
		piece = malloc(sizeof(*piece) + (size_t)size);
		if (!piece)
			die("no memory");
		*piece = (struct piece){.due = now_ns() + delay, .size = (size_t)size};
		memcpy(piece->data, buffer, (size_t)size);
		put(d, piece);
	} while (size);
	return NULL;
}

static bool write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t n = write(fd, data, size);

		if (n <= 0)
			return false;
		data += n;
		size -= (size_t)n;
	}
	return true;
}

static void *hand_on(void *arg)
{
	struct direction *d = arg;
	bool end;

	prctl(PR_SET_TIMERSLACK, 1);
	do {
		struct piece *piece = get(d);
		struct timespec due = {.tv_sec = (time_t)(piece->due / 1000000000), .tv_nsec = (long)(piece->due % 1000000000)};

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
		end = !piece->size || !write_all(d->to, piece->data, piece->size);
		free(piece);
	} while (!end);
	/* the descriptors stay open: there are few connections, and this process ends with the run */
	shutdown(d->to, SHUT_WR);
	return NULL;
}

static void start(void *(*function)(void *), void *arg)
{
	pthread_t thread;

	if ((errno = pthread_create(&thread, NULL, function, arg)))
		die("pthread_create");
	pthread_detach(thread);
}

static void join(int from, int to)
{
	struct direction *d = calloc(1, sizeof(*d));

	if (!d)
		die("no memory");
	d->from = from;
	d->to = to;
	d->last = &d->first;
	pthread_mutex_init(&d->lock, NULL);
	pthread_cond_init(&d->some, NULL);
	start(take, d);
	start(hand_on, d);
}

static struct sockaddr_in local(uint64_t port)
{
	struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

	name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return name;
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{"status-fd", required_argument, NULL, 's'},
		{"listen", required_argument, NULL, 'l'},
		{"to", required_argument, NULL, 't'},
		{"ns", required_argument, NULL, 'n'},
		{NULL, 0, NULL, 0},
	};
	uint64_t status = 0, listen_at = 0, to = 0;
	int letter, listener, one = 1;
	struct sockaddr_in here, there;

	while ((letter = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (letter) {
		case 's': status = number(optarg); break;
		case 'l': listen_at = number(optarg); break;
		case 't': to = number(optarg); break;
		case 'n': delay = number(optarg); break;
		default: return 2;
		}
	}
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	here = local(listen_at);
	there = local(to);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 64))
		die("port %d", (int)listen_at);
	if (write((int)status, "", 1) != 1)
		die("cannot signal readiness");
	for (;;) {
		int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC), server;

		if (client < 0)
			continue;
		server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (server < 0 || connect(server, (struct sockaddr *)&there, sizeof(there))) {
			close(client);
			continue;
		}
		setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		join(client, server);
		join(server, client);
	}
}
