// Four byte products per lane in one instruction, which multiplies unsigned bytes by signed ones.
#include <immintrin.h>
constexpr int ROWS = 6;
constexpr int PANELS = 1;
constexpr int FLIPPED = 0;
typedef int8_t QCode;
typedef uint8_t PCode;

static inline Register<int32_t> dot(Register<int32_t> sum, const uint8_t* four, Register<uint32_t> panel, const int8_t*) {
    return (Register<int32_t>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)in_all_lanes(four), (__m256i)panel);
}
static inline Register<int32_t> dot(Register<int32_t> sum, const int8_t* four, Register<uint32_t> panel, const uint8_t*) {
    return (Register<int32_t>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)panel, (__m256i)in_all_lanes(four));
}

#include "avx.h"
