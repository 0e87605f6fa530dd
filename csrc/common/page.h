/* Pages are 4 KiB on every machine that this project runs on (x86-64; CRIU's images count in them). */
#ifndef LAZYPAGES_PAGE_H
#define LAZYPAGES_PAGE_H

#include <stdint.h>

#define LP_PAGE_SHIFT 12
#define LP_PAGE_SIZE ((uint64_t)1 << LP_PAGE_SHIFT)

#endif
