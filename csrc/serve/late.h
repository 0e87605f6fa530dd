/*
 * Orders departures from an address range and arrivals there, if several are reported since the layout was quiescent.
 *
 * mremap moves memory only to an empty range.  So if the reports say that the range was occupied when an arrival is reported, the
 * report of an earlier departure is late.  Several departures may be reported after the arrival: one is the late one, another is
 * of the memory that arrived.  The kernel does not say which: REMAP(O to P), REMAP(P to W), UNMAP(P) is reported both if the
 * thread that had unmapped P is late, and if the thread that had moved it to W is late.
 *
 * Two facts decide:
 *
 *   - The memory that an mremap has moved can leave only after that mremap has returned, which is after its last event has been
 *     read.  A departure that is reported before that event is the earlier one.
 *   - If a thread was found waiting for its departure event to be read, after the arrival had been read and before the last event
 *     of that mremap was (`awaited`), its departure is the late one: the memory that arrived could not have been moved on yet.
 *     The late departure is read first, since events are read in the order in which they were queued (fs/userfaultfd.c,
 *     userfaultfd_ctx_read).
 *
 * If neither decides, the order is unclear, and all memory of the ranges concerned is marked lost: neither zeros nor old bytes.
 * The same holds if more has departed from a range than is known to have been there, because memory had grown.  Events that are
 * reported in the order of the changes are never unclear, except if memory has grown into a range that other memory had left
 * since the layout was quiescent.
 */
#ifndef LAZYPAGES_LATE_H
#define LAZYPAGES_LATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "address_space.h"

/*
 * Whether the report of a departure from the target of the change `move` (LP_REMAPPED) is late.  The departure includes the first
 * page of the target, and extends at most over *late.  changes: the nr changes that were read since the layout was quiescent, and
 * have not been made.
 */
bool lp_departure_is_late(const struct lp_space *space, const struct lp_change *changes, size_t nr, size_t move,
			struct lp_range *late);

/*
 * Sets unclear[i] for each change i to a range with an unclear order of departures, and for each change whose ranges overlap those
 * of an unclear change.  To be called while the layout is quiescent, before any of the changes is made.  Returns their number or
 * -ENOMEM.
 */
int lp_unclear(const struct lp_space *space, const struct lp_change *changes, size_t nr, bool *unclear);

#endif
