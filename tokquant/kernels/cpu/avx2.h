// Four products a lane by pairs of 16-bit numbers: the byte instruction of AVX2 saturates.
#include <immintrin.h>
constexpr int ROWS = 4;
constexpr int PANELS = 1;

// bytes 0 and 2, or 1 and 3, of each lane as pairs of 16-bit numbers
static inline __m256i even(__m256i x, const int8_t*) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
static inline __m256i odd(__m256i x, const int8_t*) { return _mm256_srai_epi16(x, 8); }
static inline __m256i even(__m256i x, const uint8_t*) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
static inline __m256i odd(__m256i x, const uint8_t*) { return _mm256_srli_epi16(x, 8); }

template <class A, class B>
static inline ints dot(ints sum, const A* four, words panel, const B* kind) {
    int32_t word;
    std::memcpy(&word, four, 4);
    const __m256i all = _mm256_set1_epi32(word);
    __m256i half[2], x[2];
    std::memcpy(half, &sum, sizeof sum);
    std::memcpy(x, &panel, sizeof panel);
    for (int i = 0; i < 2; i++) {
        half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(even(all, four), even(x[i], kind)));
        half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(odd(all, four), odd(x[i], kind)));
    }
    std::memcpy(&sum, half, sizeof sum);
    return sum;
}

// the low bytes of what `x + SHIFT` holds: x rounded, from 0 to 255
static inline void store_bytes(uint8_t* at, floats x) {
    ints y = as_ints(x + SHIFT) & 255;
    __m256i half[2];
    std::memcpy(half, &y, sizeof y);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
    _mm_storeu_si128((__m128i*)at, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#include "plain.h"
