// Where a tile of keys and values is in memory.
struct Tile {
    int64_t page;
    int64_t inner;  // tokens before it in the page
    const uint32_t* k;
    const uint32_t* v;
};

static inline Tile tile_at(const Arguments& a, int64_t batch, int64_t kv_head, int64_t start) {
    const int64_t page = a.table ? a.table[batch * a.pages + start / a.page] : batch;
    const int64_t inner = a.table ? start % a.page : start;
    return {
        page,
        inner,
        a.k + page * a.k_page + kv_head * a.k_head + inner / LANES * K_PANEL,
        a.v + page * a.v_page + kv_head * a.v_head + inner / TILE * CHANNELS * V_PANEL,
    };
}

#if K_SCALED
// scales or zeros, one per key of the tile; zeros beyond the last key
static inline void of_keys(float* to, const K_SCALE_TYPE* from, int count) {
    if (K_SCALE_TOKENS == 1) return spread(to, from, count, TILE);
    for (int j = 0; j < TILE; j += LANES)
        store(to + j, all(value(from[least(j, count - 1) / K_SCALE_TOKENS])));
}
#endif

#if V_PER_TILE
// scales or zeros, one per channel
static inline void of_channels(float* to, const V_SCALE_TYPE* from) {
    if (V_COLUMNS == D) return spread(to, from, D, WIDE);
    for (int d = 0; d < WIDE; d += LANES) store(to + d, all(value(from[0])));
}
#endif

// Converts the tile's scales and zeros to float32 and lays them out in `t` as the loop over rows reads them.
static inline void spread_scales(const Arguments& a, const Tile& tile, int64_t kv_head, int count, Scratch& t) {
    const auto [page, inner, k, v] = tile;
    (void)a, (void)page, (void)inner, (void)k, (void)v, (void)kv_head, (void)count, (void)t;

#if K_SCALED || K_DECODED
    const int64_t k_at = page * a.k_scale_page + kv_head * a.k_scale_head + inner / K_SCALE_TOKENS * K_COLUMNS;
#endif
#if K_SCALED
    of_keys(t.k_scale, a.k_scale + k_at, count);
#endif
#if K_ZERO
    // the value of a stored code of 0
    of_keys(t.k_zero, a.k_zero + k_at, count);
    for (int j = 0; j < TILE; j += LANES) store(t.k_zero + j, load(t.k_zero + j) + load(t.k_scale + j) * K_HALF);
#endif
#if K_DECODED
    const int64_t k_there = (K_SCALE_TOKENS == 1 ? count : (count + K_SCALE_TOKENS - 1) / K_SCALE_TOKENS) * int64_t(K_COLUMNS);
    spread(t.k_scale, a.k_scale + k_at, k_there, K_ROWS * K_COLUMNS);
#endif
#if K_DECODED_ZERO
    spread(t.k_zero, a.k_zero + k_at, k_there, K_ROWS * K_COLUMNS);
#endif

#if V_PER_TOKEN || V_PER_TILE || V_DECODED
    const int64_t v_at = page * a.v_scale_page + kv_head * a.v_scale_head + inner / V_SCALE_TOKENS * V_COLUMNS;
#endif
#if V_PER_TOKEN
    for (int j = 0; j < TILE; j += LANES) {
        const int64_t there = count - j;
        floats scale = there > 0 ? load(a.v_scale + v_at + j, there) : all(1);
        scale = where(scale == 0, all(1), scale);  // beyond the last key
        // a token of all zeros has the scale 1, marked by a minus: as a weight that could dwarf those of the other tokens
        floats weight = where(scale < 0, all(0x1p-32f), scale), inverse = 1.f / weight;
        store(t.log2_weight + j, log2_of(weight) + (weight - weight));  // NaN where the weight is not finite
        store(t.inverse_weight + j, where((inverse == inverse) & (counted_from(j) < count), inverse, all(0)));
#if V_TOKEN_ZERO
        floats zero = there > 0 ? load(a.v_zero + v_at + j, there) : all(0);
        // zero times NaN is NaN: rows that see a token of no finite weight are NaN without its zero, the others must not have it
        store(t.v_zero + j, where((inverse > 0) & (counted_from(j) < count), zero + weight * V_HALF, all(0)));
#endif
    }
#endif
#if V_PER_TILE
    of_channels(t.v_scale, a.v_scale + v_at);
#endif
#if V_TILE_ZERO
    of_channels(t.v_zero, a.v_zero + v_at);
    for (int d = 0; d < WIDE; d += LANES) store(t.v_zero + d, load(t.v_zero + d) + load(t.v_scale + d) * V_HALF);
#endif
#if V_DECODED
    spread(t.v_scale, a.v_scale + v_at, count * int64_t(V_COLUMNS), TILE * V_COLUMNS);
#endif
#if V_DECODED_ZERO
    spread(t.v_zero, a.v_zero + v_at, count * int64_t(V_COLUMNS), TILE * V_COLUMNS);
#endif
}
