/*
 * The process connector of the kernel (drivers/connector/cn_proc.c): a socket on which it reports PROC_EVENT_PTRACE.
 */
#ifndef LAZYPAGES_PROC_CONNECTOR_H
#define LAZYPAGES_PROC_CONNECTOR_H

#include <stdint.h>
#include <linux/cn_proc.h>

/* The socket, or -1: there is none to be had; in another namespace the kernel does not even refuse, it reports nothing. */
int lp_connector_open(void);
/* PROC_CN_MCAST_LISTEN or PROC_CN_MCAST_IGNORE: 0 or -1. */
int lp_connector_say(int fd, uint32_t operation);
/* One event: 1, or 0 when there is none, or -errno. */
int lp_connector_receive(int fd, struct proc_event *event);

#endif
