// Four byte products per lane. The instruction for bytes sums pairs of products in 16 bits. That is enough where codes of K or V
// have at most 4 bits; 8 bits would saturate, so these are multiplied as 16-bit numbers, by two instructions.
#include <immintrin.h>
#include <type_traits>
constexpr int ROWS = 6;
constexpr int PANELS = 1;
constexpr int FLIPPED = 0;
typedef std::conditional_t<K_BITS == 8, int16_t, int8_t> QCode;
typedef std::conditional_t<V_BITS == 8, int16_t, uint8_t> PCode;

// of every four 16-bit numbers, the first two are codes 0 and 2, the others 1 and 3
static inline void store_codes(int16_t* at, const int8_t* codes, int count) {
    for (int i = 0; i < count; i++) at[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = codes[i];
}
// the same for x in 0 to 255, rounded to the nearest integers
static inline void store_codes(int16_t* at, floats x) {
    const ints y = as_ints(x + SHIFT) & 255;
    const __m128i order = _mm_set_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const __m256i codes = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)y.low, (__m256i)y.high), 0xd8);
    _mm256_storeu_si256((__m256i*)at, _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(order)));
}

// bytes 0 and 2, or 1 and 3, of each lane as pairs of 16-bit numbers
static inline __m256i even(__m256i x, const int8_t*) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
static inline __m256i odd(__m256i x, const int8_t*) { return _mm256_srai_epi16(x, 8); }
static inline __m256i even(__m256i x, const uint8_t*) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
static inline __m256i odd(__m256i x, const uint8_t*) { return _mm256_srli_epi16(x, 8); }

template <class B>
static inline Register<int32_t> dot(Register<int32_t> sum, const int16_t* four, Register<uint32_t> panel, const B* kind) {
    sum += (Register<int32_t>)_mm256_madd_epi16((__m256i)in_all_lanes(four), even((__m256i)panel, kind));
    return sum + (Register<int32_t>)_mm256_madd_epi16((__m256i)in_all_lanes(four + 2), odd((__m256i)panel, kind));
}

// sums of two products in 16 bits. Signed codes come in the high bits of their bytes and go to the low ones
template <int BITS>
static inline __m256i pairs(const int8_t* four, Register<uint32_t> panel, const uint8_t*) {
    return _mm256_maddubs_epi16((__m256i)panel, (__m256i)in_all_lanes(four));
}
template <int BITS>
static inline __m256i pairs(const uint8_t* four, Register<uint32_t> panel, const int8_t*) {
    const __m256i sign = _mm256_set1_epi8(1 << (BITS - 1));
    const __m256i low = _mm256_sub_epi8(_mm256_xor_si256(_mm256_srli_epi16((__m256i)panel, 8 - BITS), sign), sign);
    return _mm256_maddubs_epi16((__m256i)in_all_lanes(four), low);
}
// what a code of 1 is in its byte
static inline __m256i unit(int, const uint8_t*) { return _mm256_set1_epi16(1); }
static inline __m256i unit(int bits, const int8_t*) { return _mm256_set1_epi16(short(1 << (8 - bits))); }

// eight products per lane, with codes of BITS bits in two registers
template <int BITS, class A, class B>
static inline Register<int32_t> dots(Register<int32_t> sum, const A* eight, Register<uint32_t> x, Register<uint32_t> y, const B* kind) {
    const __m256i products = _mm256_add_epi16(pairs<BITS>(eight, x, kind), pairs<BITS>(eight + 4, y, kind));
    return sum + (Register<int32_t>)_mm256_madd_epi16(products, unit(BITS, kind));
}

#include "avx.h"
