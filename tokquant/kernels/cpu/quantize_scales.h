// Reduces the extremes of groups to scales and zeros.
#if SCALE_HERE || SPANNING
#if EXACT_SCALE
static inline floats in_scale_type(floats x) { return x; }
static inline floats rounded_scale(floats x) { return x; }
static inline float scale_code(float x) { return x; }
#endif
#if HALF_SCALE
static inline floats in_scale_type(floats x) { return from_half(to_half(x)); }
static inline floats rounded_scale(floats x) { return in_scale_type(x); }
static inline half scale_code(float x) { return {uint16_t(to_half(all(x))[0])}; }
#endif
#if SMALL_SCALE
static inline floats in_scale_type(floats x) { return from_e4m3(to_e4m3(x)); }
static inline floats rounded_scale(floats x) {
    ints code = to_e4m3(x);
#if SCALE_UP
    // round up in e4m3: a scale rounded down by up to 1/16 would clip eight of the 127 levels
    code = where(from_e4m3(code) < x, code + 1, code);
#endif
    return where(x <= SCALE_LARGEST, from_e4m3(code), all(NAN));
}
static inline e4m3 scale_code(float x) { return {uint8_t(to_e4m3(all(x))[0])}; }
#endif

// stores the scales of a chunk, which were rounded to this type before
static inline void keep_scales(SCALE_TYPE* to, const float* from, int first, int end) {
    for (int i = first; i < end; i++) to[i] = scale_code(from[i]);
}

#if SYMMETRIC
constexpr int32_t BOTTOM = 0;
// |x| as integers in the same order, for maxima; NaN is above everything
static inline ints ordered(floats x) { return as_ints(magnitude(x)); }
#endif
#if ASYMMETRIC
constexpr int32_t BOTTOM = INT32_MIN;
// integers in the same order as the floats; NaN is beyond either end, by its sign
static inline ints ordered(floats x) { return as_ints(x) ^ (as_ints(x) >> 31 & INT32_MAX); }
static inline floats unordered(ints x) { return as_floats(x ^ (x >> 31 & INT32_MAX)); }
#endif

// extends the extremes by a vector's lanes, those that are channels
static inline void reach(ints& highest, ints& lowest, floats y, int d) {
    ints x = ordered(y);
#if SYMMETRIC
    (void)lowest, (void)d;
    highest = where(x > highest, x, highest);
#endif
#if ASYMMETRIC
    ints above = x, below = x;
    if (D - d < LANES) {
        above = where(counted_from(d) < D, x, ints{} + INT32_MIN);
        below = where(counted_from(d) < D, x, ints{} + INT32_MAX);
    }
    highest = where(above > highest, above, highest);
    lowest = where(below < lowest, below, lowest);
#endif
}

static inline void nothing_yet(Scratch& t) {
    for (int i = 0; i < SCALES; i += LANES) store(t.highest + i, ints{} + BOTTOM), store(t.lowest + i, ints{} + INT32_MAX);
}

// Extends the extremes of their groups by tokens `lo` to `hi` of the chunk.
static void extremes(int lo, int hi, Scratch& t) {
    if (SCALE_CHANNELS == 1) {
        for (int d = 0; d < WIDE; d += LANES) {
            ints highest = load(t.highest + d), lowest = load(t.lowest + d);
            for (int i = lo; i < hi; i++) reach(highest, lowest, load(t.y[i] + d), d);
            store(t.highest + d, highest), store(t.lowest + d, lowest);
        }
        return;
    }
    for (int i = lo; i < hi; i++)
        for (int c = 0; c < COLUMNS; c++) {
            ints highest = ints{} + BOTTOM, lowest = ints{} + INT32_MAX;
            for (int d = c * SCALE_CHANNELS; d < (c + 1) * SCALE_CHANNELS; d += LANES) reach(highest, lowest, load(t.y[i] + d), d);
            const int at = (SCALE_TOKENS == 1 ? i * COLUMNS : 0) + c;
            const int32_t high = largest_of(highest);
            t.highest[at] = high > t.highest[at] ? high : t.highest[at];
#if ASYMMETRIC
            const int32_t low = ~largest_of(~lowest);
            t.lowest[at] = low < t.lowest[at] ? low : t.lowest[at];
#endif
        }
}

// Computes scales and zeros from extremes, rounded to the type that they are stored in.
static void scales(const Arguments& a, Scratch& t) {
    (void)a;
    for (int i = 0; i < SCALES; i += LANES) {
#if SYMMETRIC
        const floats highest = as_floats(load(t.highest + i));
        floats exact = where(highest == 0, all(1), highest / LARGEST);
#endif
#if ASYMMETRIC
        const floats highest = unordered(load(t.highest + i));
        floats lowest = unordered(load(t.lowest + i));
        lowest = where(highest != highest, all(NAN), lowest);
        // a zero that overflows its type becomes NaN
        const floats zero = in_scale_type(where(magnitude(lowest) > SCALE_LARGEST, all(NAN), lowest));
        const floats span = highest - zero, step = span / LEVELS;
        // if the zero was rounded above the maximum, the scale becomes the smallest
        floats exact = where(step < 0, all(0), step);
        store(t.zero + i, zero);
#endif
        floats scale = rounded_scale(exact);
#if CHECKED
        ints lost = finite(exact) & ~finite(scale);
#if ASYMMETRIC
        lost |= (finite(lowest) & ~finite(zero)) | (finite(highest) & finite(zero) & ~finite(span));
#endif
        // lanes that belong to no group never overflow
        if (largest_of(lost & 1)) lose(a);
#endif
        store(t.scale + i, where(scale < SCALE_SMALLEST, all(SCALE_SMALLEST), scale));
    }
}
#endif
