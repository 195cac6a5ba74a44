// Measures the peak rate of a processor's multiply-adds, with all operands in registers.
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
typedef float floats __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));

// one multiply-add instruction; it depends on the sum, or the compiler would move it out of the loop
static inline floats step(floats sum) { return sum * 0.5f + 0.5f; }

// sums of bfloat16 products, two per lane
struct bfloats {
    floats sum;
    float operator[](int i) const { return sum[i]; }
};
#if defined(__AVX512BF16__)
constexpr int BFLOATS = 32;
static inline bfloats step(bfloats x) {
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
    return {(floats)_mm512_dpbf16_ps((__m512)x.sum, one, one)};
}
#else
constexpr int BFLOATS = 0;  // no such instruction
static inline bfloats step(bfloats x) { return x; }
#endif

#if defined(__AVX512VNNI__)
constexpr int PRODUCTS = 64;
static inline ints step(ints sum) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi8(3), _mm512_set1_epi8(5));
}
#elif defined(__AVXVNNI__)
constexpr int PRODUCTS = 32;
static inline ints step(ints sum) {
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi8(3), _mm256_set1_epi8(5));
}
#elif defined(__AVX2__)
constexpr int PRODUCTS = 16;
static inline ints step(ints sum) { return (ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi8(3)) + 5; }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int PRODUCTS = 16;
static inline ints step(ints sum) { return vdotq_s32(sum, vdupq_n_s8(3), vdupq_n_s8(5)); }
#else
constexpr int PRODUCTS = 0;  // no such instruction
static inline ints step(ints sum) { return sum + 1; }
#endif

// enough independent sums to hide the latency of an instruction, and no more than registers hold
constexpr int SUMS = 12;

template <class T>
static uint64_t chains(int64_t steps, int threads) {
    uint64_t kept = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : kept)
    for (int thread = 0; thread < threads; thread++) {
        T sums[SUMS];
        // different initial values, or the compiler would compute only one of the sums
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) std::memset(&sums[i], i, sizeof(T));
        for (int64_t n = 0; n < steps; n++)
#pragma GCC unroll 12
            for (int i = 0; i < SUMS; i++) sums[i] = step(sums[i]);
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) kept += uint64_t(sums[i][0]);
    }
    return kept;
}

extern "C" {
// multiply-adds of one thread in a step
int64_t products_of_integers() { return SUMS * PRODUCTS; }
int64_t products_of_bfloats() { return SUMS * BFLOATS; }
int64_t products_of_floats() { return SUMS * WIDTH / 4; }

uint64_t multiply_integers(int64_t steps, int threads) { return chains<ints>(steps, threads); }
uint64_t multiply_bfloats(int64_t steps, int threads) { return chains<bfloats>(steps, threads); }
uint64_t multiply_floats(int64_t steps, int threads) { return chains<floats>(steps, threads); }
}
