// What one thread needs: some rows of a head of K, and a tile's scores of the few that are in registers.
struct Scratch {
    alignas(64) float acc[BLOCK][WIDE];
    alignas(64) float m[BLOCK + LANES];  // the row's maximum so far
    alignas(64) float r[BLOCK + LANES];  // what P, l and acc are relative to
    alignas(64) float l[BLOCK + LANES];
    alignas(64) float s[ROWS][TILE];
    int head[BLOCK];  // of Q,
    int query[BLOCK];  // which of its queries,
    int64_t place[BLOCK];  // and where that is among the keys: the last query is at the last key
#if INTEGER_K
    alignas(64) int8_t q[BLOCK][K_DEPTH];
    int start[BLOCK];  // of sums: K's codes are counted from the lowest, or as products read them
#endif
#if BFLOAT_K
    alignas(64) uint32_t q[BLOCK][WIDE / 2];
#endif
#if INTEGER_V
    alignas(64) uint8_t p[ROWS][TILE];
    int flipped[ROWS];  // what sums begin with, as products read V
#else
    alignas(64) Values p[ROWS][V_STEPS];
#endif
#if K_UNPACKED
    alignas(64) Keys k[TILE * K_STEPS];
#endif
#if V_UNPACKED
    alignas(64) Values v[WIDE * V_STEPS];
#endif
#if K_SCALED
    alignas(64) float k_scale[TILE];  // of each key, or of all
#endif
#if K_ZERO
    alignas(64) float k_zero[TILE];
#endif
#if K_DECODED
    alignas(64) float k_scale[K_ROWS * K_COLUMNS + LANES];
#endif
#if K_DECODED_ZERO
    alignas(64) float k_zero[K_ROWS * K_COLUMNS + LANES];
#endif
#if V_PER_TOKEN
    alignas(64) float log2_weight[TILE];
    alignas(64) float inverse_weight[TILE];
#endif
#if V_TOKEN_ZERO
    alignas(64) float v_zero[TILE];
    alignas(64) float zero[BLOCK];  // the sum of P, unrounded, times V's zeros
#endif
#if V_PER_TILE
    alignas(64) float v_scale[WIDE];
#endif
#if V_TILE_ZERO
    alignas(64) float v_zero[WIDE];
    alignas(64) float sum[BLOCK];  // of P, unrounded
#endif
#if V_DECODED
    alignas(64) float v_scale[TILE * V_COLUMNS + LANES];
#endif
#if V_DECODED_ZERO
    alignas(64) float v_zero[TILE * V_COLUMNS + LANES];
#endif
#if BLOCK_MEANS
    alignas(64) float means[TILE];
#endif
#if LOWRANK
    alignas(64) float factors[ROWS][TILE];
#endif
};
