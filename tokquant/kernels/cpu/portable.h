// Four products a lane, for any processor.
constexpr int ROWS = 4;
constexpr int PANELS = 1;

template <class A, class B>
static inline ints dot(ints sum, const A* four, words panel, const B*) {
    B x[4 * LANES];
    std::memcpy(x, &panel, sizeof x);
    for (int i = 0; i < LANES; i++) {
        int32_t s = 0;
        for (int d = 0; d < 4; d++) s += int32_t(four[d]) * x[4 * i + d];
        sum[i] += s;
    }
    return sum;
}

// the low bytes of what `x + SHIFT` holds: x rounded, from 0 to 255
static inline void store_bytes(uint8_t* at, floats x) {
    ints y = as_ints(x + SHIFT);
    for (int i = 0; i < LANES; i++) at[i] = uint8_t(y[i]);
}

#include "plain.h"
