// What all processors with NEON share, whatever instructions they multiply with.
constexpr int ROWS = 4;
constexpr int PANELS = 1;
typedef int8_t QCode;
typedef uint8_t PCode;

// rounds x in 0 to 255 to the nearest integers
static inline void store_codes(uint8_t* at, floats x) { store_low(at, as_ints(x + SHIFT)); }

#include "plain.h"
