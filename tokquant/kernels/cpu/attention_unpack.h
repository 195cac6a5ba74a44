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
// a panel of a tile: [words][16] -> [D][16], or two channels in a word
static void unpack_keys(Scratch& t, const uint32_t* tile, int panel, int64_t ahead) {
    const uint32_t* from = tile + panel * K_PANEL;
    Keys* to = t.k + panel * K_STEPS * LANES;
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
        const auto number = [&](int i) {
            floats y = decode_k(code_of<K_BITS>(x, i));
#if K_DECODED
            const int group = (w * (32 / K_BITS) + i) * K_COLUMNS / D;
            y *= scale[group];
#endif
#if K_DECODED_ZERO
            y += zero[group];
#endif
#if K_DECODED
            y = as_input(y);
#endif
            return y;
        };
#pragma GCC unroll 16
        for (int i = 0; i < 32 / K_BITS; i += BFLOAT_K ? 2 : 1) {
            const int d = w * (32 / K_BITS) + i;
            if (d >= D) break;
#if BFLOAT_K
            put(to + d / 2 * LANES, in_words(number(i), d + 1 < D ? number(i + 1) : all(0)));
#else
            store(to + d * LANES, number(i));
#endif
        }
    }
}
#endif

#if V_UNPACKED
// a panel of a tile: [words][16] -> [TILE][16], or two tokens in a word
static void unpack_values(Scratch& t, const uint32_t* tile, int panel, int64_t ahead) {
    const uint32_t* from = tile + panel * V_PANEL;
    Values* to = t.v + panel * V_STEPS * LANES;
    for (int w = 0; w < V_WORDS; w++, from += LANES) {
        const words x = load(from);
        __builtin_prefetch((const char*)from + ahead, 0, 2);
        const auto number = [&](int i) {
            floats y = decode_v(code_of<V_BITS>(x, i));
#if V_DECODED
            const int token = w * (32 / V_BITS) + i;
            const int at = token * V_COLUMNS + panel * LANES * V_COLUMNS / D;
            y *= t.v_scale[at];
#endif
#if V_DECODED_ZERO
            y += t.v_zero[at];
#endif
#if V_DECODED
            y = as_input(y);
#endif
            return y;
        };
#pragma GCC unroll 16
        for (int i = 0; i < 32 / V_BITS; i += BFLOAT_V ? 2 : 1, to += LANES)
#if BFLOAT_V
            put(to, in_words(number(i), number(i + 1)));
#else
            store(to, number(i));
#endif
    }
}
#endif
