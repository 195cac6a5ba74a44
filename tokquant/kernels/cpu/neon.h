// What processors with NEON do, whatever their products.
constexpr int ROWS = 4;
constexpr int PANELS = 1;

// the low bytes of what `x + SHIFT` holds: x rounded, from 0 to 255
static inline void store_bytes(uint8_t* at, floats x) { store_low(at, as_ints(x + SHIFT)); }

#include "plain.h"
