// Four products a lane in one instruction, which takes unsigned bytes by signed ones.
#include <arm_neon.h>
constexpr int FLIPPED = 0;

static inline Register<int32_t> dot(Register<int32_t> sum, const uint8_t* four, Register<uint32_t> panel, const int8_t*) {
    return vusdotq_s32(sum, vreinterpretq_u8_u32(vld1q_dup_u32((const uint32_t*)four)), vreinterpretq_s8_u32(panel));
}
static inline Register<int32_t> dot(Register<int32_t> sum, const int8_t* four, Register<uint32_t> panel, const uint8_t*) {
    return vusdotq_s32(sum, vreinterpretq_u8_u32(panel), vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t*)four)));
}

#include "neon.h"
