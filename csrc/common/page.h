/* The page size of x86-64, the only supported architecture; also the unit of page counts in CRIU's images. */
#ifndef LAZYPAGES_PAGE_H
#define LAZYPAGES_PAGE_H

#include <stdint.h>

#define LP_PAGE_SHIFT 12
#define LP_PAGE_SIZE ((uint64_t)1 << LP_PAGE_SHIFT)

#endif
