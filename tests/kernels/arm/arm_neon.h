// What kernels take of Arm's header, as Arm's manual defines it, for any processor: so their text for Arm runs in every test.
#include <cstdint>
#include <cstring>
typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef uint8_t uint8x16_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef uint32_t uint32x4_t __attribute__((vector_size(16)));

static inline int8x16_t vreinterpretq_s8_u32(uint32x4_t x) { return (int8x16_t)x; }
static inline uint8x16_t vreinterpretq_u8_u32(uint32x4_t x) { return (uint8x16_t)x; }

// four products a lane
template <class Sum, class A, class B> static inline Sum dots(Sum sum, A a, B b) {
    for (int i = 0; i < 16; i++) sum[i / 4] += a[i] * b[i];
    return sum;
}
static inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) { return dots(sum, a, b); }
static inline uint32x4_t vdotq_u32(uint32x4_t sum, uint8x16_t a, uint8x16_t b) { return dots(sum, a, b); }
static inline int32x4_t vusdotq_s32(int32x4_t sum, uint8x16_t a, int8x16_t b) { return dots(sum, a, b); }
