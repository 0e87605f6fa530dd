/* Answers: they are checked against the requests, and their pages are placed.  Used by the serving thread, without the lock. */
#ifndef LAZYPAGES_CHANNEL_RECEIVE_H
#define LAZYPAGES_CHANNEL_RECEIVE_H

#include <stddef.h>

#include "channel.h"

#define LP_CHANNEL_BUFFER ((size_t)256 << 10) /* bytes of the receive buffer */

/* Receives and processes a bounded number of bytes, without waiting. */
void lp_channel_receive(struct lp_channel *l);

#endif
