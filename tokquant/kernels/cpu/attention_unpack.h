// K, V and their scales as they lie in memory -> what products and sums take, a tile at a time.

// the i-th code of each word
template <int BITS>
static inline ints code_of(words x, int i) {
    if (BITS == 32) return (ints)x;
    return (ints)(x >> uint32_t(BITS < 8 ? 8 * (i % 4) + BITS * (i / 4) : BITS * i)) & int((1ll << BITS) - 1);
}

// `there` numbers and zeros up to `size`, a multiple of 16
template <class T>
static inline void spread(float* to, const T* from, int64_t there, int size) {
    for (int i = 0; i < size; i += LANES) store(to + i, i < there ? load(from + i, there - i) : all(0));
}

#if K_DECODED
// a tile's scales or zeros of a panel's tokens, for each group of channels
static inline void of_panel(floats (&to)[K_COLUMNS], const float* tile, int panel) {
    const int row = panel * LANES / K_SCALE_TOKENS;
    for (int c = 0; c < K_COLUMNS; c++) {
        float x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = tile[(K_SCALE_TOKENS == 1 ? row + i : row) * K_COLUMNS + c];
        to[c] = load(x);
    }
}
#endif

#if K_UNPACKED
// a panel of a tile: [words][16] -> [D][16]
static void unpack_keys(Scratch& t, const uint32_t* tile, int panel, int64_t ahead) {
    const uint32_t* from = tile + panel * K_PANEL;
    float* to = t.k + panel * D * LANES;
#if K_DECODED
    floats scale[K_COLUMNS];
    of_panel(scale, t.k_scale, panel);
#endif
#if K_DECODED_ZERO
    floats zero[K_COLUMNS];
    of_panel(zero, t.k_zero, panel);
#endif
    for (int w = 0; w < K_WORDS; w++, from += LANES) {
        const words x = load(from);
        __builtin_prefetch((const char*)from + ahead, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < 32 / K_BITS; i++) {
            const int d = w * (32 / K_BITS) + i;
            if (d >= D) break;
            floats y = decode_k(code_of<K_BITS>(x, i));
#if K_DECODED
            y *= scale[d * K_COLUMNS / D];
#endif
#if K_DECODED_ZERO
            y += zero[d * K_COLUMNS / D];
#endif
#if K_DECODED
            y = as_input(y);
#endif
            store(to + d * LANES, y);
        }
    }
}
#endif

#if V_UNPACKED
// a panel of a tile: [words][16] -> [TILE][16]
static void unpack_values(Scratch& t, const uint32_t* tile, int panel, int64_t ahead) {
    const uint32_t* from = tile + panel * V_PANEL;
    float* to = t.v + panel * TILE * LANES;
    for (int w = 0; w < V_WORDS; w++, from += LANES) {
        const words x = load(from);
        __builtin_prefetch((const char*)from + ahead, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < 32 / V_BITS; i++) {
            const int token = w * (32 / V_BITS) + i;
            floats y = decode_v(code_of<V_BITS>(x, i));
#if V_DECODED
            const int at = token * V_COLUMNS + panel * LANES * V_COLUMNS / D;
            y *= t.v_scale[at];
#endif
#if V_DECODED_ZERO
            y += t.v_zero[at];
#endif
#if V_DECODED
            y = as_input(y);
#endif
            store(to + token * LANES, y);
        }
    }
}
#endif
