// Computes codes and stores them.
// Where a token's codes and scales are stored.
struct Place {
    int64_t page;
    int64_t inner;  // the token's index in the page
};

static inline Place place_of(const Arguments& a, int64_t batch, int64_t token) {
    if (!a.table) return {batch, token};
    return {a.table[batch * a.pages + token / a.page], token % a.page};
}

#if SCALED
static inline SCALE_TYPE* at_scale(const Arguments& a, SCALE_TYPE* scale, int64_t head, Place at) {
    return scale + at.page * a.scale_page + head * a.scale_head + at.inner / SCALE_TOKENS * COLUMNS;
}

// scales or zeros of 16 channels of a token of the chunk
static inline floats over(const float* scale, int i, int d) {
    const float* row = scale + (SCALE_TOKENS == 1 ? i * COLUMNS : 0);
    return SCALE_CHANNELS == 1 ? load(row + d) : all(row[d / SCALE_CHANNELS]);
}
#endif

// the codes of 16 channels of a token, in the low bits
static inline ints code_of(const Arguments& a, const Scratch& t, int i, int d) {
    (void)a;
    floats y = load(t.y[i] + d);
#if SYMMETRIC
    y = y / over(t.scale, i, d);
    // clamps by selection, which keeps NaN
    y = where(y > LARGEST, all(LARGEST), y);
    y = where(y < -LARGEST, all(-LARGEST), y);
#endif
#if ASYMMETRIC
    y = (y - over(t.zero, i, d)) / over(t.scale, i, d);
    y = where(y > LEVELS, all(LEVELS), y);
    y = where(y < 0, all(0), y);
    // round to the nearest integer before HALF is subtracted, which could round too
    y = nearest(y) - HALF;
#endif
    ints code = encode(y);
#if CHECKED_CODES
    if (largest_of(finite(y) & (magnitude(y) >= 65520.f) & 1)) lose(a);
#endif
    if (BITS < 32) code &= int((1ll << BITS) - 1);
    return code;
}

// the values of integer codes: their low bits with the sign extended
static inline ints number(ints code) { return code << (32 - BITS) >> (32 - BITS); }

static inline floats decode(ints code) { return to_floats(number(code)); }

// the bits that are stored: as in memory, and zero beyond the last channel
static inline ints pattern(ints code, int d) {
#if COUNTED
    code ^= 1 << (BITS - 1);
#endif
    return D - d >= LANES ? code : where(counted_from(d) < D, code, ints{});
}

#if QUERIES || KEYS
// the codes of a token side by side
static inline void line_of(const Arguments& a, const Scratch& t, int i, uint8_t* to, int64_t row) {
    (void)row;
#if CODE_SUM
    ints sum = {};
#endif
    for (int d = 0; d < WIDE; d += LANES) {
        const ints code = code_of(a, t, i, d), x = pattern(code, d);
#if CODE_SUM
        sum += D - d >= LANES ? number(code) : where(counted_from(d) < D, number(code), ints{});
#endif
        if (BYTES == 1) store_low(to + d, x);
        if (BYTES == 2) store_low((uint16_t*)to + d, x);
        if (BYTES == 4) store((int32_t*)to + d, x);
#if MET_BYTES
        uint8_t read[LANES];
        store_low(read, number(code));
        std::memcpy(a.met + row * D + d, read, least(D - d, LANES));
#endif
#if MET_FLOATS
        float read[LANES];
        store(read, decode(code));
        std::memcpy(a.met + row * D + d, read, least(D - d, LANES) * sizeof(float));
#endif
    }
#if CODE_SUM
    int32_t each[LANES], total = 0;
    store(each, sum);
    for (int j = 0; j < LANES; j++) total += each[j];
    a.code_sum[row] = float(total);
#endif
}
#endif

#if QUERIES
constexpr int WIDTH = (D * BITS + 7) / 8;  // bytes of a token

static void put(const Arguments& a, int64_t batch, int64_t head, int64_t token, int base, int lo, int hi, Scratch& t) {
    for (int i = lo; i < hi; i++) {
        const int64_t row = (batch * a.heads + head) * a.n + token + i;
        uint8_t *line = t.line[0], *to = a.codes + row * WIDTH;
        line_of(a, t, base + i, line, row);
        if (BITS >= 8) {
            std::memcpy(to, line, WIDTH);
            continue;
        }
        for (int b = 0; b < WIDTH; b++) {
            int x = 0;
            for (int part = 0; part < 8 / BITS; part++) x |= line[b * (8 / BITS) + part] << (BITS * part);
            to[b] = uint8_t(x);
        }
    }
}
#endif

#if KEYS
constexpr int WORDS = (D * BITS + 31) / 32;  // of a panel

static inline uint32_t word_of(const uint8_t* line, int w) {
    constexpr int PARTS = BITS < 8 ? 8 / BITS : 1;
    uint32_t word = 0;
    for (int part = 0; part < PARTS; part++) {
        uint32_t x;
        std::memcpy(&x, line + 4 * (w * PARTS + part), 4);
        word |= x << (BITS * part % 32);
    }
    return word;
}

static void put(const Arguments& a, int64_t batch, int64_t head, int64_t token, int base, int lo, int hi, Scratch& t) {
    const Place at = place_of(a, batch, token);
    uint32_t* to = a.codes + at.page * a.codes_page + head * a.codes_head + at.inner / LANES * (WORDS * LANES);
    for (int i = lo; i < hi; i++) line_of(a, t, base + i, t.line[i], 0);
    if (hi - lo == LANES) {
        for (int w = 0; w < WORDS; w++)
            for (int i = 0; i < LANES; i++) to[w * LANES + i] = word_of(t.line[i], w);
        return;
    }
    for (int w = 0; w < WORDS; w++)
        for (int i = lo; i < hi; i++) to[w * LANES + i] = word_of(t.line[i], w);
}
#endif

#if VALUES
constexpr int WORDS = TILE * BITS / 32;  // of a panel
constexpr int CODES = 32 / BITS;  // of a word

template <bool WHOLE>
static void put_all(const Arguments& a, uint32_t* to, int base, int lo, int hi, Scratch& t) {
#if SIGNED_SCALE
    alignas(64) int32_t something[LANES][LANES] = {};
#endif
    for (int p = 0; p < CHANNELS; p++, to += WORDS * LANES) {
#if TILE_SUMS
        ints sum = load(t.sum + p * LANES);
#endif
        for (int w = 0; w < LANES / CODES; w++) {
            words word = {};
            uint32_t written = 0;
#pragma GCC unroll 16
            for (int j = 0; j < CODES; j++) {
                const int i = w * CODES + j, shift = BITS < 8 ? 8 * (j % 4) + BITS * (j / 4) : BITS * j;
                if (!WHOLE && (i < lo || i >= hi)) continue;
                const ints code = code_of(a, t, base + i, p * LANES), x = pattern(code, p * LANES);
                word |= (words)x << uint32_t(shift);
                written |= uint32_t((1ll << BITS) - 1) << shift;
#if TILE_SUMS
                sum += number(code);
#endif
#if SIGNED_SCALE
                store(something[i], load(something[i]) | pattern((code ^ LEAST_CODE) & NOT_SIGN, p * LANES));
#endif
            }
            uint32_t* at = to + w * LANES;
            if (!WHOLE && ~written) word |= load(at) & ~written;
            put(at, word);
        }
#if TILE_SUMS
        store(t.sum + p * LANES, sum);
#endif
    }
#if SIGNED_SCALE
    for (int i = lo; i < hi; i++) {
        int any = 0;
        for (int j = 0; j < LANES; j++) any |= something[i][j];
        t.nothing[base + i] = !any;
    }
#endif
}

static void put(const Arguments& a, int64_t batch, int64_t head, int64_t token, int base, int lo, int hi, Scratch& t) {
    const Place at = place_of(a, batch, token);
    uint32_t* to = a.codes + at.page * a.codes_page + head * a.codes_head + at.inner / TILE * (CHANNELS * WORDS * LANES);
    to += at.inner % TILE / CODES * LANES;
    if (hi - lo == LANES)
        put_all<true>(a, to, base, lo, hi, t);
    else
        put_all<false>(a, to, base, lo, hi, t);
#if TILE_SUMS
    const int64_t end = token + LANES;
    if (end % TILE == 0 || end >= a.n) {
        const int64_t tiles = (a.n + TILE - 1) / TILE, row = (batch * a.heads + head) * tiles + token / TILE;
        std::memcpy(a.code_sum + row * D, t.sum, D * sizeof(int32_t));
        std::memset(t.sum, 0, sizeof t.sum);
    }
#endif
}
#endif
