// Four byte products per lane, for any processor.
constexpr int ROWS = 4;
constexpr int PANELS = 1;
constexpr int FLIPPED = 0;
typedef int8_t QCode;
typedef uint8_t PCode;

static inline Register<int32_t> byte(Register<uint32_t> x, int i, const int8_t*) { return (Register<int32_t>)(x << 8 * (3u - i)) >> 24; }
static inline Register<int32_t> byte(Register<uint32_t> x, int i, const uint8_t*) { return (Register<int32_t>)(x >> 8u * i & 255u); }

template <class A, class B>
static inline Register<int32_t> dot(Register<int32_t> sum, const A* four, Register<uint32_t> panel, const B* kind) {
    for (int i = 0; i < 4; i++) sum += byte(panel, i, kind) * int32_t(four[i]);
    return sum;
}

// rounds x in 0 to 255 to the nearest integers
static inline void store_codes(uint8_t* at, floats x) { store_low(at, as_ints(x + SHIFT)); }

#include "plain.h"
