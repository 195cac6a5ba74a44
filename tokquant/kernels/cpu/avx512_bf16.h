// Two bfloat16 products per lane in one instruction, which takes subnormal numbers for zero.
#include "avx512_vnni.h"

static inline floats dot(floats sum, uint32_t two, words panel) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(two)), (__m512bh)panel);
}

// numbers that bfloat16 holds, two in a word
static inline words in_words(floats low, floats high) { return (words)as_ints(low) >> 16u | ((words)as_ints(high) & 0xffff0000u); }
static inline void store_bfloats(uint32_t* at, floats x) { store_low((uint16_t*)at, as_ints(x) >> 16); }

// two tokens of V per word, with zero for those whose weight in P is zero
static inline words weighed(uint32_t two, words v) { return v & ((two & 0xffffu ? 0xffffu : 0) | (two >> 16 ? 0xffff0000u : 0)); }
