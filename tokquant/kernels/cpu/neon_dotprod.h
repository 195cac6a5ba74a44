// Four byte products per lane in one instruction, whose operands are both signed or both unsigned. So the highest bit of K and
// V is flipped, which shifts their codes by 128; sums begin with a value that corrects for that.
#include <arm_neon.h>
constexpr int FLIPPED = 128;

static inline Register<int32_t> dot(Register<int32_t> sum, const uint8_t* four, Register<uint32_t> panel, const int8_t*) {
    const uint8x16_t b = vreinterpretq_u8_u32(panel ^ 0x80808080u);
    return (Register<int32_t>)vdotq_u32((uint32x4_t)sum, vreinterpretq_u8_u32(in_all_lanes(four)), b);
}
static inline Register<int32_t> dot(Register<int32_t> sum, const int8_t* four, Register<uint32_t> panel, const uint8_t*) {
    const int8x16_t b = vreinterpretq_s8_u32(panel ^ 0x80808080u);
    return vdotq_s32(sum, vreinterpretq_s8_u32(in_all_lanes(four)), b);
}

#include "neon.h"
