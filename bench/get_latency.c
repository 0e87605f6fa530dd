/*
 * Requests pages from a page server on this machine and measures the time of each answer:
 *
 *   get_latency PORT HEADER PID BASE PAGES TAG COUNT BATCH THINK
 *
 * COUNT requests of BATCH pages at a random place in the PAGES pages from BASE
 * on (written by lazypages/bench/fill.c with TAG), one at a time, with headers
 * of HEADER bytes, and THINK nanoseconds of work before each. Prints
 * the times in nanoseconds, one a line. Every page is checked.
 */
#include "../lazypages/bench/common.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static void receive(int fd, void *at, size_t size)
{
	for (uint8_t *to = at; size;) {
		ssize_t got = recv(fd, to, size, MSG_WAITALL);

		if (got <= 0)
			die("the server has closed the connection");
		to += got;
		size -= (size_t)got;
	}
}

static size_t put(uint8_t *at, size_t header, uint64_t pid, uint64_t vaddr, uint64_t pages)
{
	memset(at, 0, header);
	at[0] = 7;
	memcpy(at + (header == 24 ? 4 : 8), &pages, header == 24 ? 4 : 8);
	memcpy(at + header - 16, &vaddr, 8);
	memcpy(at + header - 8, &pid, 8);
	return header;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	uint64_t pid, base, pages, tag, count, batch, think, seed = 88172645463325252ull, *data, *times;
	uint8_t header[32];
	size_t size;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	if (argc != 10)
		die("usage: get_latency PORT HEADER PID BASE PAGES TAG COUNT BATCH THINK");
	address.sin_port = htons((uint16_t)number(argv[1]));
	size = number(argv[2]);
	pid = number(argv[3]);
	base = number(argv[4]);
	pages = number(argv[5]);
	tag = number(argv[6]);
	count = number(argv[7]);
	batch = number(argv[8]);
	think = number(argv[9]);
	data = malloc(batch * PAGE);
	times = calloc(count, sizeof(*times));
	if (!data || !times || (size != 24 && size != 32))
		die("no memory");
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (uint64_t i = 0; i < count; i++) {
		uint64_t first, began = now_ns(), asked = batch, got = 0;

		while (now_ns() - began < think)
			;
		seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
		first = seed % (pages - batch + 1);
		began = now_ns();
		while (got < asked) { /* answers may be short */
			uint64_t vaddr = base + (first + got) * PAGE, nr = 0;

			put(header, size, pid, vaddr, asked - got);
			if (send(fd, header, size, MSG_NOSIGNAL) != (ssize_t)size)
				die("send");
			receive(fd, header, size);
			memcpy(&nr, header + (size == 24 ? 4 : 8), size == 24 ? 4 : 8);
			if (!nr || nr > asked - got)
				die("a wrong answer");
			receive(fd, data + got * WORDS, nr * PAGE);
			got += nr;
		}
		times[i] = now_ns() - began;
		for (uint64_t word = 0; word < batch * WORDS; word += WORDS / 8)
			if (data[word] != word_of(tag, first + word / WORDS, word % WORDS)) {
				errno = 0;
				die("WRONG MEMORY: page %llu", (unsigned long long)(first + word / WORDS));
			}
	}
	for (uint64_t i = 0; i < count; i++)
		printf("%llu\n", (unsigned long long)times[i]);
	return 0;
}
