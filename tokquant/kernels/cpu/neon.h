// What all processors with NEON share, whatever instructions they multiply with.
constexpr int ROWS = 4;
constexpr int PANELS = 1;

// stores each lane's low byte of `x + SHIFT`: x in 0 to 255, rounded to the nearest integer
static inline void store_bytes(uint8_t* at, floats x) { store_low(at, as_ints(x + SHIFT)); }

#include "plain.h"
