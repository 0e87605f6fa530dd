/*
 * Which departure from a place came before other memory arrived there, when several are reported since the layout was quiescent.
 *
 * Memory moves only to where nothing is.  So if a place was taken, as far as has been reported, when an arrival there was reported,
 * a departure from before is reported late.  Of several departures that are reported afterwards one is the late one, another that of
 * what has arrived, and the kernel does not say which: REMAP(O to P), REMAP(P to W), UNMAP(P) is the same whether the thread that had
 * unmapped P is late or the one that had moved it to W.
 *
 *   - A thread that leaves with what an mremap has brought does so after that mremap has returned, and this is after its last
 *     event has been read.  What is reported before that has left before.
 *   - If a thread was seen to wait for its report of leaving the place to be read, after the move had been read and before that last
 *     event was (`awaited`), it is the late one: what has arrived could not have been moved on yet.  Its report is read before any
 *     of what has arrived, since events are read in the order in which they were queued (fs/userfaultfd.c, userfaultfd_ctx_read).
 *
 * Where neither holds it is unclear, and what has been in the places concerned is lost: neither zeros nor old bytes.  Likewise where
 * more has left a place than is known to have been there: memory that has grown.  Events that are reported in the order of what
 * has happened leave nothing unclear, unless memory has grown to where other memory had just been, before the layout was quiescent.
 */
#ifndef LAZYPAGES_LATE_H
#define LAZYPAGES_LATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "address_space.h"

/*
 * Whether a thread that has left the place to which the change `move` (LP_REMAPPED) has moved memory has not reported that yet: at
 * least where the place begins, at most in *late.  changes: those since the layout was quiescent, not made yet; nr: how many have been
 * read.
 */
bool lp_someone_is_late(const struct lp_space *space, const struct lp_change *changes, size_t nr, size_t move,
			struct lp_range *late);

/*
 * While the layout is quiescent, before any of the changes is made: unclear[i]: change i is about places where it is unclear what
 * left first.  With it all changes whose places meet those.  How many, or -ENOMEM.
 */
int lp_unclear(const struct lp_space *space, const struct lp_change *changes, size_t nr, bool *unclear);

#endif
