// Unpacks K, V and their scales from memory into the form that products and sums read, a tile at a time.

#if K_UNPACKED || V_UNPACKED
// each word shifted so that its i-th code is in the lowest bits
template <int BITS>
static inline words codes_from(words x, int i) {
    return BITS == 32 ? x : x >> uint32_t(BITS < 8 ? 8 * (i % 4) + BITS * (i / 4) : BITS * i);
}

// the i-th code of each word
template <int BITS>
static inline ints code_of(words x, int i) { return (ints)codes_from<BITS>(x, i) & int((1ll << BITS) - 1); }

#if K_TABLES || V_TABLES
// all possible codes, one per lane. Decoding these gives a table, from which `picked` takes lanes by a code's lowest four bits
template <int BITS>
static inline ints every_code() { return counted_from(0) & int((1ll << BITS) - 1); }
#endif
#endif

// copies `there` numbers, and fills up with zeros to `size`, a multiple of 16
template <class T>
static inline void spread(float* to, const T* from, int64_t there, int size) {
    for (int i = 0; i < size; i += LANES) store(to + i, i < there ? load(from + i, there - i) : all(0));
}

#if K_DECODED
constexpr bool K_OF_TOKENS = K_SCALE_TOKENS == 1;  // whether each token has its own scales; else a panel's tokens share them
constexpr int K_GROUPS = K_OF_TOKENS ? K_COLUMNS : 1;

// the scales (or zeros) of a panel's 16 tokens, for each group of channels
static inline void of_panel(floats (&to)[K_GROUPS], const float* tile, int panel) {
    if (!K_OF_TOKENS) return;
    for (int c = 0; c < K_GROUPS; c++) {
        float x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = tile[(panel * LANES + i) * K_COLUMNS + c];
        to[c] = load(x);
    }
}

// the scales (or zeros) of a panel's 16 tokens for channel d
static inline floats of_channel(const floats (&panels)[K_GROUPS], const float* tile, int panel, int d) {
    const int group = d * K_COLUMNS / D;
    return K_OF_TOKENS ? panels[group] : all(tile[panel * LANES / K_SCALE_TOKENS * K_COLUMNS + group]);
}
#endif

#if K_UNPACKED
// panels that are unpacked at once: as many as can use the same table
constexpr int K_AT_ONCE = K_TABLES ? 2 : 1;
static_assert(K_AT_ONCE == 1 || K_AT_ONCE == PANELS, "what is unpacked into one place is multiplied before the next");

// unpacks panels of a tile that has `there` tokens: [words][16] -> [D][16], or two channels in a word
static void unpack_keys(Keys* to, const Scratch& t, const uint32_t* tile, int panel, int there, int64_t ahead) {
    const uint32_t* from = tile + panel * K_PANEL;
    const int64_t next = (panel + 1) * LANES < there ? K_PANEL : 0;  // there may be no memory behind the last panel
    (void)next, (void)t;
#if K_DECODED
    floats scale[K_GROUPS];
    of_panel(scale, t.k_scale, panel);
#endif
#if K_DECODED_ZERO
    floats zero[K_GROUPS];
    of_panel(zero, t.k_zero, panel);
#endif
    for (int w = 0; w < K_WORDS; w++, from += LANES) {
        words x[K_AT_ONCE];
        for (int p = 0; p < K_AT_ONCE; p++) {
            x[p] = load(from + p * next);
            __builtin_prefetch((const char*)(from + p * next) + ahead, 0, 2);
        }
#if K_LOOKED_UP
        words pairs[2];
        look_up_k(pairs, x[0]);
#endif
        const auto number = [&](int i) {
#if K_TABLES
            floats y = decode_k(every_code<K_BITS>());
#else
#if K_LOOKED_UP
            floats y = from_pairs(pairs, i);
#else
            floats y = decode_k(code_of<K_BITS>(x[0], i));
#endif
#endif
#if K_DECODED
            y *= of_channel(scale, t.k_scale, panel, w * (32 / K_BITS) + i);
#endif
#if K_DECODED_ZERO
            y += of_channel(zero, t.k_zero, panel, w * (32 / K_BITS) + i);
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
            const floats numbers[2] = {number(i), d + 1 < D ? number(i + 1) : all(0)};
#if K_TABLES
            const words table = tables(numbers[0], numbers[1]);
            for (int p = 0; p < K_AT_ONCE; p++)
                put(to + (p * K_STEPS + d / 2) * LANES, picked(table, codes_from<K_BITS>(x[p], i)));
#else
            put(to + d / 2 * LANES, in_words(numbers[0], numbers[1]));
#endif
#else
            const floats numbers = number(i);
#if K_TABLES
            for (int p = 0; p < K_AT_ONCE; p++)
                store(to + (p * K_STEPS + d) * LANES, picked(numbers, codes_from<K_BITS>(x[p], i)));
#else
            store(to + d * LANES, numbers);
#endif
#endif
        }
    }
}
#endif

#if V_UNPACKED
// panels that are unpacked at once: as many as can use the same table
constexpr int V_AT_ONCE = V_TABLES ? 2 : 1;
static_assert(V_AT_ONCE == 1 || V_AT_ONCE == PANELS, "what is unpacked into one place is multiplied before the next");

// unpacks panels of a tile: [words][16] -> [TILE][16], or two tokens in a word
static void unpack_values(Values* to, const Scratch& t, const uint32_t* tile, int panel, int64_t ahead) {
    const uint32_t* from = tile + panel * V_PANEL;
    (void)t;
    for (int w = 0; w < V_WORDS; w++, from += LANES) {
        words x[V_AT_ONCE];
        for (int p = 0; p < V_AT_ONCE; p++) {
            x[p] = load(from + p * V_PANEL);
            __builtin_prefetch((const char*)(from + p * V_PANEL) + ahead, 0, 2);
        }
#if V_LOOKED_UP
        words pairs[2];
        look_up_v(pairs, x[0]);
#endif
        const auto number = [&](int i) {
#if V_TABLES
            floats y = decode_v(every_code<V_BITS>());
#else
#if V_LOOKED_UP
            floats y = from_pairs(pairs, i);
#else
            floats y = decode_v(code_of<V_BITS>(x[0], i));
#endif
#endif
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
        for (int i = 0; i < 32 / V_BITS; i += BFLOAT_V ? 2 : 1, to += LANES) {
#if BFLOAT_V
            const floats numbers[2] = {number(i), number(i + 1)};
#if V_TABLES
            const words table = tables(numbers[0], numbers[1]);
            for (int p = 0; p < V_AT_ONCE; p++) put(to + p * V_STEPS * LANES, picked(table, codes_from<V_BITS>(x[p], i)));
#else
            put(to, in_words(numbers[0], numbers[1]));
#endif
#else
            const floats numbers = number(i);
#if V_TABLES
            for (int p = 0; p < V_AT_ONCE; p++) store(to + p * V_STEPS * LANES, picked(numbers, codes_from<V_BITS>(x[p], i)));
#else
            store(to, numbers);
#endif
#endif
        }
    }
}
#endif
