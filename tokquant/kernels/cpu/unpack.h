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

#if K_BYTES_UNPACKED
// counted from the lowest: in the low bits of each byte
static void unpack_keys(const uint32_t* from, uint8_t* to, int64_t lines) {
    for (int64_t line = 0; line < lines; line++)
        for (int i = 0; i < 8 / K_BITS; i++) {
            words x = load(from + line * LANES) >> uint32_t(i * K_BITS) & ((1u << K_BITS) - 1) * 0x01010101u;
            std::memcpy(to + (line * (8 / K_BITS) + i) * 64, &x, 64);
        }
}
#endif

#if V_BYTES_UNPACKED
// in the high bits of each byte, so that the sign is in its place: 2^(8 - V_BITS) times what they stand for
static void unpack_values(const uint32_t* from, int8_t* to, int64_t lines) {
    constexpr uint32_t mask = (((1u << V_BITS) - 1) << (8 - V_BITS)) * 0x01010101u;
    for (int64_t line = 0; line < lines; line++)
        for (int i = 0; i < 8 / V_BITS; i++) {
            words x = load(from + line * LANES) << uint32_t(8 - V_BITS - i * V_BITS) & mask;
            std::memcpy(to + (line * (8 / V_BITS) + i) * 64, &x, 64);
        }
}
#endif

#if K_DECODED || V_DECODED
// a decoded operand is rounded to the input's own type
static inline floats as_input(floats x) {
#if ROUNDED_TO_INPUT
    return rounded_to<INPUT_MANTISSA, INPUT_LEAST>(x);
#else
    return x;
#endif
}
#endif

#if K_FLOATS_UNPACKED
// [panels][words][16] -> [panels][D][16]; scales and zeros [rows][K_COLUMNS] are those of the tile
static void unpack_keys(const uint32_t* from, float* to, int panels, const float* scale, const float* zero) {
    for (int p = 0; p < panels; p++) {
#if K_DECODED
        floats s[K_COLUMNS], z[K_COLUMNS];
        for (int c = 0; c < K_COLUMNS; c++)
            if (K_SCALE_TOKENS == 1) {
                for (int i = 0; i < LANES; i++) {
                    s[c][i] = scale[(p * LANES + i) * K_COLUMNS + c];
                    z[c][i] = zero[(p * LANES + i) * K_COLUMNS + c];
                }
            } else {
                const int row = p * LANES / K_SCALE_TOKENS;
                s[c] = all(scale[row * K_COLUMNS + c]), z[c] = all(zero[row * K_COLUMNS + c]);
            }
#else
        (void)scale, (void)zero;
#endif
        for (int w = 0; w < K_WORDS; w++) {
            const words x = load(from + (p * K_WORDS + w) * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < 32 / K_BITS; i++) {
                const int d = w * (32 / K_BITS) + i;
                if (d >= D) break;
                floats y = decode_k(code_of<K_BITS>(x, i));
#if K_DECODED
                y = as_input(y * s[d * K_COLUMNS / D] + z[d * K_COLUMNS / D]);
#endif
                store(to + (p * D + d) * LANES, y);
            }
        }
    }
}
#endif

#if V_FLOATS_UNPACKED
// [panels][words][16] -> [panels][TILE][16]; scales and zeros [TILE][V_COLUMNS] are those of the tile
static void unpack_values(const uint32_t* from, float* to, const float* scale, const float* zero) {
    (void)scale, (void)zero;
    for (int p = 0; p < CHANNELS; p++)
        for (int w = 0; w < V_WORDS; w++) {
            const words x = load(from + (p * V_WORDS + w) * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < 32 / V_BITS; i++) {
                const int token = w * (32 / V_BITS) + i;
                floats y = decode_v(code_of<V_BITS>(x, i));
#if V_DECODED
                const int at = token * V_COLUMNS + p * LANES * V_COLUMNS / D;
                y = as_input(y * scale[at] + zero[at]);
#endif
                store(to + (p * TILE + token) * LANES, y);
            }
        }
}
#endif
