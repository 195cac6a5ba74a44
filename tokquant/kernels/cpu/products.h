// A[R rows] B[W panels], with the R x W sums in registers, so that each load of A or B serves several products. Then `then(r, w,
// sum)` is called for every sum, still in its register; it is a copy and captures by value, as what it only refers to is read again
// after each store. Functions are not inlined, as compilers would give some of the registers that these loops need to the code
// around them.
#if INTEGERS
template <int N, class A, class B>
static inline Two<int32_t, N> dot(Two<int32_t, N> sum, const A* four, Two<uint32_t, N> panel, const B* kind) {
    return {dot(sum.low, four, panel.low, kind), dot(sum.high, four, panel.high, kind)};
}

// eight products per lane, with codes of BITS bits in two vectors
template <int BITS, class Sum, class A, class Panel, class B>
static inline Sum dots(Sum sum, const A* eight, Panel x, Panel y, const B* kind) {
    return dot(dot(sum, eight, x, kind), eight + 4, y, kind);
}
template <int BITS, int N, class A, class B>
static inline Two<int32_t, N> dots(Two<int32_t, N> sum, const A* eight, Two<uint32_t, N> x, Two<uint32_t, N> y, const B* kind) {
    return {dots<BITS>(sum.low, eight, x.low, y.low, kind), dots<BITS>(sum.high, eight, x.high, y.high, kind)};
}

// codes as a row of a product has them: where it has bytes, as they are in memory
static inline void store_codes(int8_t* at, const int8_t* codes, int count) { std::memcpy(at, codes, count); }

// the i-th code of each byte, for codes of fewer than 8 bits, in a byte of its own: unsigned codes in its low bits, signed ones in
// its high bits, where the sign belongs
template <int BITS> static inline words plane(words x, int i, const uint8_t*) {
    return x >> uint32_t(i * BITS) & ((1u << BITS) - 1) * 0x01010101u;
}
template <int BITS> static inline words plane(words x, int i, const int8_t*) {
    return x << uint32_t(8 - BITS - i * BITS) & (((1u << BITS) - 1) << (8 - BITS)) * 0x01010101u;
}

template <int BITS, int R, int W, class A, class B, class F>
[[gnu::noinline]] static void multiply(const A* a, int64_t row, const B* b, int64_t panel, int lines, int64_t ahead, F then) {
    // independent sums for every other line, if there are too few to hide an instruction's latency
    constexpr int CHAINS = R * W * 64 / REGISTER < 8 ? 2 : 1;
    ints sum[CHAINS][R][W] = {};
    const auto line = [&](ints (&sum)[R][W], const A* a, const B* b) {
        words x[W];
        for (int w = 0; w < W; w++) {
            x[w] = load((const uint32_t*)(b + w * panel));
            __builtin_prefetch(b + w * panel + ahead, 0, 2);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8 / BITS; i += 2, a += 8)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int w = 0; w < W; w++)
                    if constexpr (BITS == 8)
                        sum[r][w] = dot(sum[r][w], a + r * row, x[w], b);
                    else
                        sum[r][w] = dots<BITS>(sum[r][w], a + r * row, plane<BITS>(x[w], i, b), plane<BITS>(x[w], i + 1, b), b);
    };
    int at = 0;
    for (; at + CHAINS <= lines; at += CHAINS, a += CHAINS * 32 / BITS, b += CHAINS * 64)
#pragma GCC unroll 2
        for (int chain = 0; chain < CHAINS; chain++) line(sum[chain], a + chain * 32 / BITS, b + chain * 64);
    if (at < lines) line(sum[0], a, b);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) then(r, w, CHAINS == 1 ? sum[0][r][w] : sum[0][r][w] + sum[CHAINS - 1][r][w]);
}
#endif

#if FLOATS
static inline floats dot(floats sum, float a, floats panel) { return sum + a * panel; }

// the same for floats, or for words of two bfloat16 numbers; `then` is also told whether all sums are finite
template <int R, int W, class T, class F>
[[gnu::noinline]] static void multiply(const T* a, int64_t row, const T* b, int64_t panel, int steps, F then) {
    floats sum[R][W] = {};
    for (const T* end = b + LANES * steps; b < end; a++, b += LANES)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) sum[r][w] = dot(sum[r][w], a[r * row], load(b + w * panel));
    floats odd = all(0);  // x - x is 0 where x is finite
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) odd += sum[r][w] - sum[r][w];
    const bool finite = sum_of(odd) == 0;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) then(r, w, sum[r][w], finite);
}
#endif

template <int N> struct Count { static constexpr int value = N; };

// calls `f(Count<R>, first row)` until all rows are done, R at a time: as many as registers hold, then 4, then 1
template <class F>
static inline void in_rows(int rows, F f) {
    int at = 0;
    for (; rows - at >= ROWS; at += ROWS) f(Count<ROWS>(), at);
    for (; rows - at >= 4; at += 4) f(Count<4>(), at);
    for (; at < rows; at++) f(Count<1>(), at);
}

// calls `f(Count<W>, first panel)` likewise, AT_ONCE panels at a time, then 1
template <int AT_ONCE = PANELS, class F>
static inline void in_panels(int panels, F f) {
    int at = 0;
    for (; panels - at >= AT_ONCE; at += AT_ONCE) f(Count<AT_ONCE>(), at);
    for (; at < panels; at++) f(Count<1>(), at);
}

#if !INTEGER_V
static inline floats weighed(float, floats v) { return v; }

// P V where a weight of zero contributes nothing, even if V is inf or NaN there: a product that is not finite is computed anew
template <class T>
static inline floats kept(floats product, const T* p, const T* v, int steps) {
    if (sum_of(product - product) == 0) return product;
    product = all(0);
    for (int j = 0; j < steps; j++)
        if (p[j] != 0) product = dot(product, p[j], weighed(p[j], load(v + LANES * j)));
    return product;
}
#endif
