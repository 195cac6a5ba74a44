// Functions in plain C++, for instruction sets that have no instruction of their own for them.
static inline floats maximum(floats a, floats b) { return where(a > b, a, b); }

static inline float largest_of(floats x) {
    return folded<float>(x, [](auto a, auto b) { return where(a > b, a, b); });
}
static inline float sum_of(floats x) {
    return folded<float>(x, [](auto a, auto b) { return a + b; });
}

// 2^x for x up to 126, 0 from -126 down
static inline floats exp2_of(floats x) {
    floats clamped = maximum(all(-126.f), x);
    floats shifted = clamped + SHIFT;
    ints power = (as_ints(shifted) << 23) + 0x3f800000;
    floats y = exp2_of_fraction(clamped - (shifted - SHIFT)) * as_floats(power);
    return as_floats(as_ints(y) & ~(x < -126.f));
}

// the values of codes in a table of 2^BITS entries, at least 16
template <int BITS>
static inline floats looked_up(const float* values, ints code) {
    float x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = values[code[i]];
    return load(x);
}

static inline floats decoded_half(ints x) { return from_half(x); }
static inline floats rounded_half(floats x) {
    const floats size = rounded<10, -14>(magnitude(x));
    return as_floats(as_ints(where(magnitude(x) >= 65520.f, all(INFINITY), size)) | (as_ints(x) & int32_t(0x80000000)));
}
