// Tables of the values of codes, held in AVX-512 registers.
#if K_TABLES || V_TABLES
// lanes of a table, indexed by the lowest four bits of each lane of `at`
static inline floats picked(floats table, words at) { return (floats)_mm512_permutexvar_ps((__m512i)at, (__m512)table); }

#if BFLOAT_K || BFLOAT_V
// two tables of 16 values as bfloat16 in one register; `picked` gives a word of two values: of the first table by bits 0 to 3
// of `at`, of the second by bits 8 to 11
static inline words tables(floats first, floats second) {
    return (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
static inline words picked(words tables, words at) {
    at = (at & 0xfu) | (at << 8u & 0xf0000u) | 0x100000u;
    return (words)_mm512_permutexvar_epi16((__m512i)at, (__m512i)tables);
}
#endif
#endif

#if K_LOOKED_UP || V_LOOKED_UP
// 8-bit codes with a sign bit -> bfloat16 values, by a table of magnitudes for the other 7 bits. `pairs[0]` has the values of
// bytes 0 and 1 of each word of x, `pairs[1]` those of bytes 2 and 3
static inline void looked_up(words (&pairs)[2], const uint16_t* magnitudes, words x) {
    __m512i table[4];
    for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512(magnitudes + 32 * i);
    // reorders the bytes of each word to 0, 2, 1, 3, so that the low bytes of 16-bit halves are bytes 0 and 1
    const __m512i low = _mm512_shuffle_epi8((__m512i)x, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
    const __m512i high = _mm512_srli_epi16(low, 8), sign = _mm512_set1_epi16(int16_t(0x8000));
    const auto numbers = [&](__m512i at, __m512i signs) {
        const __m512i small = _mm512_permutex2var_epi16(table[0], at, table[1]);
        const __m512i large = _mm512_permutex2var_epi16(table[2], at, table[3]);
        const __m512i y = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(at, _mm512_set1_epi16(0x40)), small, large);
        return (words)_mm512_or_si512(y, _mm512_and_si512(signs, sign));
    };
    pairs[0] = numbers(low, _mm512_slli_epi16(low, 8));
    pairs[1] = numbers(high, low);
}

// the i-th of those four values as float32
static inline floats from_pairs(const words (&pairs)[2], int i) {
    return as_floats((ints)(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16u));
}
#endif
