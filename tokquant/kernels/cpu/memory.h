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
