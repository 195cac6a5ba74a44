// 16 numbers at a time, by the compilers' own vector types: what follows compiles for every processor.
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr float NOTHING = -INFINITY;

static inline floats all(float x) { return floats{} + x; }
static inline floats load(const float* at) { floats x; std::memcpy(&x, at, sizeof x); return x; }
static inline ints load(const int32_t* at) { ints x; std::memcpy(&x, at, sizeof x); return x; }
static inline words load(const uint32_t* at) { words x; std::memcpy(&x, at, sizeof x); return x; }
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

// what is nearest in bfloat16, half to even
static inline floats rounded_bfloat(floats x) {
    const words bits = (words)as_ints(x);
    return as_floats((ints)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u));
}

// patterns in the low bits of each lane, as the numbers they stand for
static inline floats from_half(ints x) {
    floats y = as_floats((x & 0x7fff) << 13) * 0x1p112f;
    y = (x & 0x7c00) == 0x7c00 ? as_floats((x & 0x3ff) << 13 | 0x7f800000) : y;
    return as_floats(as_ints(y) | (x & 0x8000) << 16);
}
static inline floats from_bfloat(ints x) { return as_floats(x << 16); }
static inline floats from_e4m3(ints x) {
    floats y = as_floats((x & 0x7f) << 20) * 0x1p120f;
    y = (x & 0x7f) == 0x7f ? all(NAN) : y;
    return as_floats(as_ints(y) | (x & 0x80) << 24);
}

// 16 numbers from memory, in whatever type they lie there
struct half { uint16_t bits; };
struct e4m3 { uint8_t bits; };
static inline floats load(const half* at) {
    uint16_t x __attribute__((vector_size(32)));
    std::memcpy(&x, at, sizeof x);
    return from_half(__builtin_convertvector(x, ints));
}
static inline floats load(const e4m3* at) {
    uint8_t x __attribute__((vector_size(16)));
    std::memcpy(&x, at, sizeof x);
    return from_e4m3(__builtin_convertvector(x, ints));
}
// of which only the first ones exist; zeros beyond
template <class T>
static inline floats load(const T* at, int64_t there) {
    if (there >= LANES) return load(at);
    T x[LANES] = {};
    for (int i = 0; i < there; i++) x[i] = at[i];
    return load(x);
}

static inline float value(float x) { return x; }
static inline float value(half x) { return from_half(ints{} + x.bits)[0]; }
static inline float value(e4m3 x) { return from_e4m3(ints{} + x.bits)[0]; }

// of positive normal numbers, by the series of the area tangent: the rest of it is under 1e-9
static inline floats log2_of(floats x) {
    ints power = (as_ints(x) - 0x3f3504f3) >> 23;  // so that what is left lies between sqrt(1/2) and sqrt(2)
    floats m = as_floats(as_ints(x) - (power << 23)), z = (m - 1.f) / (m + 1.f), square = z * z;
    floats series = 2.885390082f + square * (0.961796694f + square * (0.577078016f + square * (0.412198583f + square * 0.320598898f)));
    return to_floats(power) + z * series;
}
