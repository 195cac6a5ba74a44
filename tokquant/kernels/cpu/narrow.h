// Rounds float32 to the bits of narrower floats: to the nearest, half to even.

// the code of |x| as a float with MANTISSA bits of mantissa, exponent bias 1 - LEAST, and subnormal numbers below 2^LEAST
template <int MANTISSA, int LEAST>
static inline ints narrow(floats x) {
    constexpr uint32_t CUT = 23 - MANTISSA;
    const words bits = (words)as_ints(magnitude(x));  // unsigned, as rounding the bits of a NaN may overflow int32
    ints normal = (ints)((bits + ((1u << (CUT - 1)) - 1) + (bits >> CUT & 1u)) >> CUT) - ((126 + LEAST) << MANTISSA);
    if (LEAST > -126) {
        const floats shift = all(1.5f * __builtin_ldexpf(1, 23 + LEAST - MANTISSA));
        normal = where(magnitude(x) < __builtin_ldexpf(1, LEAST), as_ints(magnitude(x) + shift) - as_ints(shift), normal);
    }
    return normal;
}
static inline ints sign_at(floats x, int bit) { return as_ints(x) >> (31 - bit) & (1 << bit); }
static inline ints to_half(floats x) {
    ints code = where(magnitude(x) < 65520.f, narrow<10, -14>(x), ints{} + 0x7c00);
    return where(x == x, code, ints{} + 0x7e00) | sign_at(x, 15);
}
static inline ints to_bfloat(floats x) { return where(x == x, narrow<7, -126>(x), ints{} + 0x7fc0) | sign_at(x, 15); }
