// Memory of one thread: the state of a block of rows, and the scores of one tile for the few rows that are computed at once.
struct Scratch {
    alignas(64) float acc[BLOCK][WIDE];
    alignas(64) float m[BLOCK + LANES];  // the row's running maximum
    alignas(64) float r[BLOCK + LANES];  // the reference that P, l and acc are scaled to
    alignas(64) float l[BLOCK + LANES];  // the row's sum of P
    alignas(64) float s[ROWS][TILE];
    int head[BLOCK];  // the row's head of Q,
    int query[BLOCK];  // its query of that head,
    int64_t place[BLOCK];  // and that query's position among the keys: the last query is at the last key
#if INTEGER_K
    alignas(64) QCode q[BLOCK][K_DEPTH];
    int start[BLOCK];  // initial value of a row's products, which corrects for codes of K that are stored with an offset
#endif
#if BFLOAT_K
    alignas(64) uint32_t q[BLOCK][WIDE / 2];
#endif
#if INTEGER_V
    alignas(64) PCode p[ROWS][TILE];
    int flipped[ROWS];  // initial value of a row's products, which corrects for V's highest bits being flipped
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
    alignas(64) float k_scale[TILE];  // one per key, all equal if one scale covers the tile
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
