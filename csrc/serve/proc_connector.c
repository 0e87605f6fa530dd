#define _GNU_SOURCE
#include "proc_connector.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/connector.h>
#include <linux/filter.h>
#include <linux/netlink.h>

/* How long the kernel may take to confirm, ms.  It does so before send(2) returns (cn_proc_mcast_ctl). */
#define ACK_MS 100
#define MESSAGE_MAX 512

/*
 * Wakes us for what we want only: the kernel reports each fork, exec and exit of the machine as well.  At 36 bytes, after the headers of
 * netlink and connector, a message has the kind of its event; BPF loads big-endian.
 */
static int filter(int fd)
{
	const unsigned int kind = NLMSG_LENGTH(sizeof(struct cn_msg)) + offsetof(struct proc_event, what);
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kind),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, htonl(PROC_EVENT_PTRACE), 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, htonl(PROC_EVENT_NONE), 0, 1), /* the answer to our own message */
		BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};

	return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program));
}

int lp_connector_say(int fd, uint32_t operation)
{
	struct {
		struct nlmsghdr netlink;
		struct cn_msg connector;
		uint32_t operation;
	} __attribute__((packed)) message = {
		.netlink = {.nlmsg_len = sizeof(message), .nlmsg_type = NLMSG_DONE},
		.connector = {.id = {CN_IDX_PROC, CN_VAL_PROC}, .len = sizeof(operation)},
		.operation = operation,
	};

	return send(fd, &message, sizeof(message), 0) == (ssize_t)sizeof(message) ? 0 : -1;
}

int lp_connector_receive(int fd, struct proc_event *event)
{
	char buffer[MESSAGE_MAX];
	const size_t start = NLMSG_LENGTH(sizeof(struct cn_msg));
	struct sockaddr_nl from = {0};
	socklen_t length = sizeof(from);
	ssize_t got;

	do {
		got = recvfrom(fd, buffer, sizeof(buffer), MSG_DONTWAIT, (struct sockaddr *)&from, &length);
		if (got < 0)
			return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	} while (from.nl_pid || (size_t)got < start + sizeof(event->what)); /* not the kernel */
	memset(event, 0, sizeof(*event));
	memcpy(event, buffer + start, (size_t)got - start < sizeof(*event) ? (size_t)got - start : sizeof(*event));
	return 1;
}

int lp_connector_open(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC};
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_CONNECTOR);
	struct proc_event event;

	if (fd < 0)
		return -1;
	if (!filter(fd) && !bind(fd, (struct sockaddr *)&address, sizeof(address)) && !lp_connector_say(fd, PROC_CN_MCAST_LISTEN)) {
		struct pollfd waiting = {.fd = fd, .events = POLLIN};

		while (poll(&waiting, 1, ACK_MS) > 0 && lp_connector_receive(fd, &event) > 0)
			if (event.what == PROC_EVENT_NONE && !event.event_data.ack.err)
				return fd;
	}
	close(fd);
	return -1;
}
