// Four byte products per lane in one instruction, which multiplies unsigned bytes by signed ones.
#include <immintrin.h>
constexpr int ROWS = 8;
constexpr int PANELS = 2;
constexpr int FLIPPED = 0;
typedef int8_t QCode;
typedef uint8_t PCode;

static inline ints dot(ints sum, const uint8_t* four, words panel, const int8_t*) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)in_all_lanes(four), (__m512i)panel);
}
static inline ints dot(ints sum, const int8_t* four, words panel, const uint8_t*) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)panel, (__m512i)in_all_lanes(four));
}

static inline floats maximum(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float largest_of(floats x) { return _mm512_reduce_max_ps((__m512)x); }
static inline float sum_of(floats x) { return _mm512_reduce_add_ps((__m512)x); }

// 2^x for x up to 126; 0 where that underflows float32
static inline floats exp2_of(floats x) {
    // if an operand is NaN, max returns the second one: NaN stays NaN
    __m512 y = _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);
    __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (floats)_mm512_scalef_ps((__m512)exp2_of_fraction((floats)_mm512_sub_ps(y, whole)), whole);
}

// rounds x in 0 to 255 to the nearest integers
static inline void store_codes(uint8_t* at, floats x) {
    _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8((__m512i)(x + SHIFT)));
}

// the values of codes in a table of 2^BITS entries, at least 16
template <int BITS>
static inline floats looked_up(const float* values, ints code) {
    if (BITS > 4) return (floats)_mm512_i32gather_ps((__m512i)code, values, 4);
    return (floats)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(values));
}

static inline floats rounded_half(floats x) { return (floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 0)); }
static inline floats decoded_half(ints x) { return (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
