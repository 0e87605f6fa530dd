/*
 * What length this kernel's REMAP events have when an mremap shrinks what it moves: before about 6.15 the one from before, since
 * then the one that has been moved.  Found out by doing it once (less than a millisecond), since distributions backport patches.
 */
#ifndef LAZYPAGES_OLD_LENGTH_H
#define LAZYPAGES_OLD_LENGTH_H

#include <stdbool.h>

/* True also where it can't be found out: no userfaultfd for this process. */
bool lp_reports_old_length(void);

#endif
