/* Requests of background pages, and the sending of all requests.  Used by the serving thread, without the lock. */
#ifndef LAZYPAGES_CHANNEL_SEND_H
#define LAZYPAGES_CHANNEL_SEND_H

#include "channel.h"

/* Requests background pages, as many as the budget and the window allow. */
void lp_channel_request_background(struct lp_channel *l);
/* Sends what the socket takes. */
void lp_channel_flush(struct lp_channel *l);
/* Has epoll report what the channel waits for. */
void lp_channel_update_epoll(struct lp_channel *l);

#endif
