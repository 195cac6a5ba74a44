// 16 numbers at a time, by the compilers' own vector types: what follows compiles for every processor.
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr float NOTHING = -INFINITY;

static inline floats all(float x) { return floats{} + x; }
static inline floats load(const float* at) { floats x; std::memcpy(&x, at, sizeof x); return x; }
static inline ints load(const int32_t* at) { ints x; std::memcpy(&x, at, sizeof x); return x; }
static inline void store(float* at, floats x) { std::memcpy(at, &x, sizeof x); }
static inline floats to_floats(ints x) { return __builtin_convertvector(x, floats); }
static inline floats to_floats(floats x) { return x; }
static inline floats as_floats(ints x) { floats y; std::memcpy(&y, &x, sizeof y); return y; }
static inline ints as_ints(floats x) { ints y; std::memcpy(&y, &x, sizeof y); return y; }
static inline floats magnitude(floats x) { return as_floats(as_ints(x) & 0x7fffffff); }
static inline ints counted_from(int first) { return ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first; }

// 1.5 * 2^23 leaves no bits for fractions: the sum holds the nearest integer, half to even
constexpr float SHIFT = 12582912.f;
static inline floats nearest(floats x) { return (x + SHIFT) - SHIFT; }

// the polynomial of least relative error, 1.4e-7, between -1/2 and 1/2
static inline floats exp2_of_fraction(floats f) {
    floats p = all(0.001331027247942984f);
    p = p * f + 0.009672376327216625f;
    p = p * f + 0.05550583451986313f;
    p = p * f + 0.24022182822227478f;
    p = p * f + 0.6931470632553101f;
    return p * f + 1.0f;
}

// x >= 0 with so many bits of mantissa, half to even; numbers below 2^LEAST are subnormal
template <int MANTISSA, int LEAST>
static inline floats rounded(floats x) {
    floats power = as_floats(as_ints(x) & 0x7f800000), least = all(__builtin_ldexpf(1, LEAST));
    power = power < least ? least : power;
    floats shift = power * (1.5f * (1 << (23 - MANTISSA)));
    return (x + shift) - shift;
}
