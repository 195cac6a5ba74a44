// Four byte products per lane, as two multiplications of 16-bit pairs: the byte instruction of AVX2 would saturate.
#include <immintrin.h>
constexpr int ROWS = 4;
constexpr int PANELS = 1;
constexpr int FLIPPED = 0;

// bytes 0 and 2, or 1 and 3, of each lane as pairs of 16-bit numbers
static inline __m256i even(__m256i x, const int8_t*) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
static inline __m256i odd(__m256i x, const int8_t*) { return _mm256_srai_epi16(x, 8); }
static inline __m256i even(__m256i x, const uint8_t*) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
static inline __m256i odd(__m256i x, const uint8_t*) { return _mm256_srli_epi16(x, 8); }

template <class A, class B>
static inline Register<int32_t> dot(Register<int32_t> sum, const A* four, Register<uint32_t> panel, const B* kind) {
    const __m256i a = (__m256i)in_all_lanes(four), b = (__m256i)panel;
    sum += (Register<int32_t>)_mm256_madd_epi16(even(a, four), even(b, kind));
    return sum + (Register<int32_t>)_mm256_madd_epi16(odd(a, four), odd(b, kind));
}

#include "avx.h"
