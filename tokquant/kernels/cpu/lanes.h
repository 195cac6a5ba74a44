// Vectors of 16 numbers, in as many registers as that takes, by the compilers' vector extensions. GCC would keep a vector wider
// than a register in memory, so that such a vector is a struct of two halves here.
constexpr int LANES = 16;

template <class T, int N> struct Two;
template <class T, int N, bool FITS = (sizeof(T) * N <= REGISTER)> struct Vector { using type = Two<T, N>; };
template <class T, int N> struct Vector<T, N, true> { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <class T> using Register = typename Vector<T, REGISTER / 4>::type;  // one register's worth of 4-byte lanes
typedef Vector<float, LANES>::type floats;
typedef Vector<int32_t, LANES>::type ints;
typedef Vector<uint32_t, LANES>::type words;

template <class T, int N> struct Two {
    using Half = typename Vector<T, N / 2>::type;
    using Mask = Two<int32_t, N>;
    Half low, high;
    Two() = default;
    Two(Half low, Half high) : low(low), high(high) {}
    Two(T x) : low(x - Half{}), high(x - Half{}) {}
    template <class U> explicit operator Two<U, N>() const { return {(typename Two<U, N>::Half)low, (typename Two<U, N>::Half)high}; }
    T operator[](int i) const { return i < N / 2 ? low[i] : high[i - N / 2]; }

    friend Two operator+(Two x, Two y) { return {x.low + y.low, x.high + y.high}; }
    friend Two operator-(Two x, Two y) { return {x.low - y.low, x.high - y.high}; }
    friend Two operator*(Two x, Two y) { return {x.low * y.low, x.high * y.high}; }
    friend Two operator/(Two x, Two y) { return {x.low / y.low, x.high / y.high}; }
    friend Two operator&(Two x, Two y) { return {x.low & y.low, x.high & y.high}; }
    friend Two operator|(Two x, Two y) { return {x.low | y.low, x.high | y.high}; }
    friend Two operator^(Two x, Two y) { return {x.low ^ y.low, x.high ^ y.high}; }
    friend Two operator<<(Two x, T bits) { return {x.low << bits, x.high << bits}; }
    friend Two operator>>(Two x, T bits) { return {x.low >> bits, x.high >> bits}; }
    friend Two operator-(Two x) { return {-x.low, -x.high}; }
    friend Two operator~(Two x) { return {~x.low, ~x.high}; }
    friend Mask operator==(Two x, Two y) { return {x.low == y.low, x.high == y.high}; }
    friend Mask operator!=(Two x, Two y) { return {x.low != y.low, x.high != y.high}; }
    friend Mask operator<(Two x, Two y) { return {x.low < y.low, x.high < y.high}; }
    friend Mask operator>(Two x, Two y) { return {x.low > y.low, x.high > y.high}; }
    friend Mask operator<=(Two x, Two y) { return {x.low <= y.low, x.high <= y.high}; }
    friend Mask operator>=(Two x, Two y) { return {x.low >= y.low, x.high >= y.high}; }
    Two& operator+=(Two x) { return *this = *this + x; }
    Two& operator-=(Two x) { return *this = *this - x; }
    Two& operator*=(Two x) { return *this = *this * x; }
    Two& operator&=(Two x) { return *this = *this & x; }
    Two& operator|=(Two x) { return *this = *this | x; }
    Two& operator^=(Two x) { return *this = *this ^ x; }
};

// What has no operator: each function for one register, and for two halves.
template <class M, class V> static inline V where(M condition, V x, V y) { return condition ? x : y; }
template <class T, int N> static inline Two<T, N> where(Two<int32_t, N> condition, Two<T, N> x, Two<T, N> y) {
    return {where(condition.low, x.low, y.low), where(condition.high, x.high, y.high)};
}

template <class V, class T> static inline void get(V& x, const T* at) { std::memcpy(&x, at, sizeof x); }
template <class T, int N> static inline void get(Two<T, N>& x, const T* at) { get(x.low, at), get(x.high, at + N / 2); }

template <class V, class T> static inline void put(T* at, V x) { std::memcpy(at, &x, sizeof x); }
template <class T, int N> static inline void put(T* at, Two<T, N> x) { put(at, x.low), put(at + N / 2, x.high); }

static inline Register<float> to_floats(Register<int32_t> x) { return __builtin_convertvector(x, Register<float>); }
template <int N> static inline Two<float, N> to_floats(Two<int32_t, N> x) { return {to_floats(x.low), to_floats(x.high)}; }
static inline floats to_floats(floats x) { return x; }

// loads integers of fewer bytes as int32
template <class T> static inline void widen(Register<int32_t>& x, const T* at) {
    Register<T> narrow;
    std::memcpy(&narrow, at, sizeof narrow);
    x = __builtin_convertvector(narrow, Register<int32_t>);
}
template <class T, int N> static inline void widen(Two<int32_t, N>& x, const T* at) { widen(x.low, at), widen(x.high, at + N / 2); }
// stores the low bits as integers of fewer bytes
template <class T> static inline void store_low(T* at, Register<int32_t> x) {
    const Register<T> narrow = __builtin_convertvector(x, Register<T>);
    std::memcpy(at, &narrow, sizeof narrow);
}
template <class T, int N> static inline void store_low(T* at, Two<int32_t, N> x) {
    store_low(at, x.low), store_low(at + N / 2, x.high);
}

// the same four bytes in every lane
static inline Register<uint32_t> in_all_lanes(const void* four) {
    uint32_t word;
    std::memcpy(&word, four, 4);
    return word - Register<uint32_t>{};
}

// reduces all lanes to one number by f, halving their count each time
template <class T, int N = LANES, class V, class F> static inline T folded(V x, F f) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        typename Vector<T, N / 2>::type half[2];
        std::memcpy(half, &x, sizeof x);
        return folded<T, N / 2>(f(half[0], half[1]), f);
    }
}

static inline floats all(float x) { return x - floats{}; }
static inline floats load(const float* at) { floats x; get(x, at); return x; }
static inline ints load(const int32_t* at) { ints x; get(x, at); return x; }
static inline words load(const uint32_t* at) { words x; get(x, at); return x; }
static inline void store(float* at, floats x) { put(at, x); }
static inline floats as_floats(ints x) { return (floats)x; }
static inline ints as_ints(floats x) { return (ints)x; }
static inline floats magnitude(floats x) { return as_floats(as_ints(x) & 0x7fffffff); }
static inline ints counted_from(int first) {
    constexpr int32_t NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(NUMBERS) + first;
}
constexpr float NOTHING = -INFINITY;
// adding 1.5 * 2^23 leaves no bits for a fraction: the low bits of the sum are the nearest integer, half to even
constexpr float SHIFT = 12582912.f;
static inline floats nearest(floats x) { return (x + SHIFT) - SHIFT; }

// 2^f for f from -1/2 to 1/2: the minimax polynomial, of relative error 1.4e-7
static inline floats exp2_of_fraction(floats f) {
    floats p = all(0.001331027247942984f);
    p = p * f + 0.009672376327216625f;
    p = p * f + 0.05550583451986313f;
    p = p * f + 0.24022182822227478f;
    p = p * f + 0.6931470632553101f;
    return p * f + 1.0f;
}

// x >= 0 rounded to MANTISSA bits of mantissa, half to even; numbers below 2^LEAST are rounded as subnormal ones
template <int MANTISSA, int LEAST>
static inline floats rounded(floats x) {
    floats power = as_floats(as_ints(x) & 0x7f800000), least = all(__builtin_ldexpf(1, LEAST));
    power = where(power < least, least, power);
    floats shift = power * (1.5f * (1 << (23 - MANTISSA)));
    return (x + shift) - shift;
}

// rounded to bfloat16, half to even
static inline floats rounded_bfloat(floats x) {
    const words bits = (words)as_ints(x);
    return as_floats((ints)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u));
}

// decode the bits of a narrower float, in the low bits of each lane
static inline floats from_half(ints x) {
    floats y = as_floats((x & 0x7fff) << 13) * 0x1p112f;
    y = where((x & 0x7c00) == 0x7c00, as_floats((x & 0x3ff) << 13 | 0x7f800000), y);
    return as_floats(as_ints(y) | (x & 0x8000) << 16);
}
static inline floats from_bfloat(ints x) { return as_floats(x << 16); }
static inline floats from_e4m3(ints x) {
    floats y = as_floats((x & 0x7f) << 20) * 0x1p120f;
    y = where((x & 0x7f) == 0x7f, all(NAN), y);
    return as_floats(as_ints(y) | (x & 0x80) << 24);
}
static inline floats from_e2m1(ints x) {
    const floats y = as_floats((x & 7) << 22) * 0x1p126f;
    return as_floats(as_ints(y) | (x & 8) << 28);
}

// load 16 numbers as float32, whatever type they have in memory
struct half { uint16_t bits; };
struct e4m3 { uint8_t bits; };
static inline floats load(const half* at) {
    ints x;
    widen(x, &at->bits);
    return from_half(x);
}
static inline floats load(const e4m3* at) {
    ints x;
    widen(x, &at->bits);
    return from_e4m3(x);
}
// the same where only the first `there` exist; zeros beyond
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

// log2 of positive normal numbers, by the series of ln m in (m - 1) / (m + 1), whose remainder is under 1e-9
static inline floats log2_of(floats x) {
    ints power = (as_ints(x) - 0x3f3504f3) >> 23;  // so that the mantissa m is between sqrt(1/2) and sqrt(2)
    floats m = as_floats(as_ints(x) - (power << 23)), z = (m - 1.f) / (m + 1.f), square = z * z;
    floats series = 2.885390082f + square * (0.961796694f + square * (0.577078016f + square * (0.412198583f + square * 0.320598898f)));
    return to_floats(power) + z * series;
}
