// Four byte products per lane in one instruction, which multiplies unsigned bytes by signed ones.
#include <arm_neon.h>
constexpr int FLIPPED = 0;

static inline Register<int32_t> dot(Register<int32_t> sum, const uint8_t* four, Register<uint32_t> panel, const int8_t*) {
    return vusdotq_s32(sum, vreinterpretq_u8_u32(in_all_lanes(four)), vreinterpretq_s8_u32(panel));
}
static inline Register<int32_t> dot(Register<int32_t> sum, const int8_t* four, Register<uint32_t> panel, const uint8_t*) {
    return vusdotq_s32(sum, vreinterpretq_u8_u32(panel), vreinterpretq_s8_u32(in_all_lanes(four)));
}

#include "neon.h"
