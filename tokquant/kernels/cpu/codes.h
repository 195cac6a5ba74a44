// Rounds float32 to the codes of narrower types: to the nearest, half to even.

struct bfloat { uint16_t bits; };
static inline floats load(const bfloat* at) {
    ints x;
    widen(x, &at->bits);
    return from_bfloat(x);
}

static inline void store(int32_t* at, ints x) { put(at, x); }
static inline ints finite(floats x) { return magnitude(x) < INFINITY; }

static inline int32_t largest_of(ints x) {
    return folded<int32_t>(x, [](auto a, auto b) { return where(a > b, a, b); });
}
static inline float sum_of(floats x) {
    return folded<float>(x, [](auto a, auto b) { return a + b; });
}

// each lane swapped with the one STRIDE away
template <int STRIDE>
static inline floats swapped(floats x) {
    float from[LANES], y[LANES];
    store(from, x);
    for (int i = 0; i < LANES; i++) y[i] = from[i ^ STRIDE];
    return load(y);
}

// the nearest integer in two's complement, in the low bits. NaN becomes 0; the scale of its group is NaN, which keeps it
static inline ints nearest_integers(floats x) { return as_ints(where(x == x, x, all(0)) + SHIFT); }

static inline ints to_e4m3(floats x) { return where(x == x, narrow<3, -6>(x), ints{} + 0x7f) | sign_at(x, 7); }
static inline ints to_e5m2(floats x) { return where(x == x, narrow<2, -14>(x), ints{} + 0x7f) | sign_at(x, 7); }
// counts the midpoints between values that |x| is above, a tie going to the even code; NaN is above none
static inline ints to_e2m1(floats x) {
    const floats y = magnitude(x);
    return -((y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) + (y > 5.f)) | sign_at(x, 3);
}
