/*
 * Bitmaps of pages, changed word by word: each word atomically.
 */
#ifndef LAZYPAGES_PAGE_BITS_H
#define LAZYPAGES_PAGE_BITS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef _Atomic uint64_t lp_word;

static inline uint64_t lp_mask_of(uint64_t from, uint64_t to)
{
	/* bits [from, to) of one word, 0 <= from < to <= 64 */
	return (to == 64 ? 0 : (uint64_t)1 << to) - ((uint64_t)1 << from);
}

#define LP_FOR_WORDS(d, nr, word, mask)                                                                                   \
	for (uint64_t d_ = (d), e_ = d_ + (nr), word, mask, n_;                                                        \
	     d_ < e_ && (word = d_ / 64, n_ = (word + 1) * 64 < e_ ? (word + 1) * 64 : e_,                             \
			 mask = lp_mask_of(d_ % 64, n_ - word * 64), true);                                               \
	     d_ = n_)

static inline bool lp_test_bit(const lp_word *bits, uint64_t d)
{
	return atomic_load(&bits[d / 64]) >> (d % 64) & 1;
}

static inline uint64_t lp_count_bits(const lp_word *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	LP_FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(atomic_load(&bits[word]) & mask);
	return count;
}

static inline uint64_t lp_set_bits(lp_word *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	LP_FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(~atomic_fetch_or(&bits[word], mask) & mask);
	return count;
}

static inline uint64_t lp_clear_bits(lp_word *bits, uint64_t d, uint64_t nr)
{
	uint64_t count = 0;

	LP_FOR_WORDS(d, nr, word, mask)
		count += (uint64_t)__builtin_popcountll(atomic_fetch_and(&bits[word], ~mask) & mask);
	return count;
}

#endif
