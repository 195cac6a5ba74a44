// What all processors with AVX2 share, whatever instructions they multiply with.
// rounds x in 0 to 255 to the nearest integers
static inline void store_codes(uint8_t* at, floats x) {
    const ints y = as_ints(x + SHIFT) & 255;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)y.low, (__m256i)y.high), 0xd8);
    _mm_storeu_si128((__m128i*)at, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#include "plain.h"
