// The loop over tiles of keys.
#if PAIRS
// 16 values for pairs of a query and a key from `at` on, `step` apart (0: broadcast); zeros beyond the first `there`
template <class T>
static inline floats pairs(const T* at, int64_t step, int there) {
    float x[LANES] = {};
    if (step == 1 && there >= LANES)
        for (int i = 0; i < LANES; i++) x[i] = at[i];
    else
        for (int i = 0; i < there && i < LANES; i++) x[i] = at[i * step];
    return load(x);
}
#endif

#if SOFTCAP
// 1 - 2 / (exp(2 x) + 1) is right at both ends, where exp(2 x) is huge or 0; near zero it cancels, so there the series
static inline floats tanh_of(floats x) {
    floats square = x * x;
    floats series = x + x * square * (-0.33333334f + square * (0.13333334f + square * -0.053968254f));
    floats power = x * 2.8853900817779268f;
    floats far = 1.f - 2.f / (exp2_of(where(power > 126.f, all(126.f), power)) + 1.f);
    return where(magnitude(x) < 0.25f, series, far);
}
#endif

// The position of a sequence's first query among its keys: the last query is at the last key.
static inline int64_t first_place(const Arguments& a, int64_t batch) {
    return (a.lengths ? a.lengths[batch] : a.n_k) - a.n_q + (a.newer ? a.newer[batch] : 0);
}

// Attention of `rows` rows from `first` on, rows being the queries of all heads that share a head of K, to keys [from, to).
// The sums go to `t`.
static void attend(const Arguments& a, int64_t batch, int64_t kv_head, int64_t first, int rows, int64_t from, int64_t to, Scratch& t) {
    const int64_t shared = a.heads / a.kv_heads, row = (batch * a.heads + kv_head * shared) * a.n_q + first;
    const int64_t n_k = a.lengths ? a.lengths[batch] : a.n_k;
    int64_t lowest = INT64_MAX, highest = INT64_MIN;  // positions of these queries
    for (int i = 0; i < rows; i++) {
        t.head[i] = int(kv_head * shared + (first + i) / a.n_q);
        t.query[i] = int((first + i) % a.n_q);
        t.place[i] = t.query[i] + first_place(a, batch);
        lowest = least(lowest, t.place[i]), highest = most(highest, t.place[i]);
    }
#if INTEGER_K
    std::memset(t.q, 0, sizeof t.q);
    for (int i = 0; i < rows; i++) {
        store_codes(t.q[i], a.q + (row + i) * D, D);
        t.start[i] = 0;
        for (int d = 0; d < D; d++) t.start[i] += (K_LOWEST + FLIPPED) * a.q[(row + i) * D + d];
    }
#else
#if BFLOAT_K
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < D; d += LANES) store_bfloats(&t.q[i][d / 2], load(a.q + (row + i) * D + d, D - d));
    const uint32_t* q = t.q[0];
    constexpr int64_t q_row = WIDE / 2;
#else
    const float* q = a.q + row * D;
    constexpr int64_t q_row = D;
#endif
#endif
    for (int i = 0; i < BLOCK + LANES; i++) t.m[i] = NOTHING, t.r[i] = t.l[i] = 0;
    std::memset(t.acc, 0, sizeof t.acc);
#if V_TILE_ZERO
    std::memset(t.sum, 0, sizeof t.sum);
#endif
#if V_TOKEN_ZERO
    std::memset(t.zero, 0, sizeof t.zero);
#endif

    int64_t begin = from, end = least(to, n_k);
#if RIGHT
    end = least(end, highest + 1 + a.right);
#endif
#if LEFT
    begin = most(begin, most(0, lowest - a.left) / TILE * TILE);
#endif
#if K_UNPACKED || V_UNPACKED
    // if all rows are multiplied at once, each unpacked panel is read only once: all then share one place, which stays in L1
    const bool alone = rows == ROWS || rows == 4 || rows == 1;
#endif
    const int group = ROWS == 6 && rows == 8 ? 4 : ROWS;  // eight rows are rather twice four than six and two
    Tile next = begin < end ? tile_at(a, batch, kv_head, begin) : Tile();
    for (int64_t start = begin; start < end; start += TILE) {
        const int there = int(least(TILE, n_k - start));
        const Tile tile = next;
        if (start + TILE < end) next = tile_at(a, batch, kv_head, start + TILE);
        // the next tile is prefetched while this one is computed: hardware cannot predict its page
        const int64_t k_ahead = (const char*)next.k - (const char*)tile.k, v_ahead = (const char*)next.v - (const char*)tile.v;
        (void)k_ahead, (void)v_ahead;
        spread_scales(a, tile, kv_head, there, t);
#if K_UNPACKED
        int k_unpacked = 0;  // panels unpacked so far; the first rows that need a panel unpack it
#endif
#if V_UNPACKED
        int v_unpacked = 0;
#endif
#if BLOCK_MEANS
        in_panels((least(TILE, end - start) + LANES - 1) / LANES, [&](auto W, int64_t at) {
            const float* mean = a.q_mean + ((batch * a.heads + t.head[0]) * ((a.n_q + 127) / 128) + t.query[0] / 128) * D;
            const int64_t panels = (n_k + LANES - 1) / LANES, panel = (batch * a.kv_heads + kv_head) * panels + start / LANES + at;
            const auto then = [=, &t, &a](int, int w, floats product, bool) {
                store(t.means + (at + w) * LANES, product * (a.scale * LOGIT_BASE));
            };
            multiply<1, W.value>(mean, D, a.companion + panel * D * LANES, D * LANES, D, then);
        });
#endif
        for (int g = 0; g < rows; g += group) {
            const int count = int(least(group, rows - g));
            int keys = there;  // keys of the tile that at least one of these rows sees
            bool edge = false;  // whether one of them sees fewer, so that masks are needed
#if BOUNDED
            int64_t first_place = INT64_MAX, last_place = INT64_MIN;
            for (int i = g; i < g + count; i++)
                first_place = least(first_place, t.place[i]), last_place = most(last_place, t.place[i]);
#endif
#if RIGHT
            keys = int(least(keys, last_place + a.right + 1 - start));
            edge = edge || start + keys > first_place + a.right + 1;
#endif
#if LEFT
            edge = edge || start < last_place - a.left;
#endif
            if (keys <= 0) continue;
            edge = edge || keys % LANES;
            const int columns = (keys + LANES - 1) / LANES;
            // scores
            in_rows(count, [&](auto R, int i) {
                in_panels<R.value <= 4 && INTEGER_K && K_BITS == 8 ? 1 : PANELS>(columns, [&](auto W, int64_t at) {
#if K_UNPACKED
                    Keys* panel = t.k + (alone ? 0 : at) * K_STEPS * LANES;
                    for (; k_unpacked < at + W.value; k_unpacked += K_AT_ONCE)
                        unpack_keys(panel + (k_unpacked - at) * K_STEPS * LANES, t, tile.k, k_unpacked, there, k_ahead);
#else
                    const Keys* panel = (const Keys*)(tile.k + at * K_PANEL);
#endif
#if INTEGER_K
                    const auto then = [=, &t](int r, int w, ints sum) {
                        store(&t.s[i + r][(at + w) * LANES], to_floats(sum + t.start[g + i + r]));
                    };
                    multiply<K_BITS, R.value, W.value>(t.q[g + i], K_DEPTH, panel, 4 * K_PANEL, K_WORDS, k_ahead, then);
#else
                    const auto then = [=, &t](int r, int w, floats sum, bool) { store(&t.s[i + r][(at + w) * LANES], sum); };
                    multiply<R.value, W.value>(q + (g + i) * q_row, q_row, panel, K_STEPS * LANES, K_STEPS, then);
#endif
                });
#if LOWRANK
                in_panels(columns, [&](auto W, int64_t at) {
                    const int64_t head = t.head[g];
                    const float* x = a.q_factors + batch * a.q_factors_batch + head * a.q_factors_head + t.query[g + i] * RANK;
                    const float* y = a.k_factors + batch * a.k_factors_batch + head * a.k_factors_head;
                    const auto then = [=, &t](int r, int w, floats sum, bool) { store(&t.factors[i + r][(at + w) * LANES], sum); };
                    multiply<R.value, W.value>(x, RANK, y + (start / LANES + at) * RANK * LANES, RANK * LANES, RANK, then);
                });
#endif
            });

            // scores to logits in base 2, and each row's maximum
            alignas(64) float largest[LANES], alpha[LANES], base[LANES];
            store(largest, all(NOTHING));
            for (int i = 0; i < count; i++) {
                const int64_t head = t.head[g + i], query = t.query[g + i], own = t.place[g + i] - start;
                (void)head, (void)query, (void)own;
                float factor = a.scale * LOGIT_BASE;
#if Q_SCALED
                factor *= a.q_scale[row + g + i];
#endif
#if K_UNIFORM
                factor *= t.k_scale[0];
#endif
#if BOOLEAN_MASK || ADDITIVE_MASK
                const auto mask = a.mask + batch * a.mask_batch + head * a.mask_head + query * a.mask_row
                                + start * a.mask_column;
#endif
#if DENSE_BIAS
                const float* bias = a.bias + batch * a.bias_batch + head * a.bias_head + query * a.bias_row
                                  + start * a.bias_column;
#endif
                floats top = all(NOTHING);
                for (int j = 0; j < columns * LANES; j += LANES) {
                    floats s = load(&t.s[i][j]);
#if K_EACH
                    s *= load(t.k_scale + j);
#endif
#if K_ZERO
                    s += a.q_sum[row + g + i] * load(t.k_zero + j);
#endif
                    s *= factor;
#if BLOCK_MEANS
                    s += load(t.means + j);
#endif
#if LOWERED_SOFTCAP
                    s += a.logit_offset[row + g + i] * a.scale;
#endif
#if SOFTCAP
                    s = a.softcap * tanh_of(s / a.softcap);
#endif
#if ALIBI
                    s -= a.slopes[head] * magnitude(to_floats(counted_from(int(j - own))));
#endif
#if KEY_VECTOR
                    s += load(a.key_bias + batch * a.key_bias_batch + head * a.key_bias_head + start + j);
#endif
#if LOWRANK
                    s += load(&t.factors[i][j]);
#endif
#if DENSE_BIAS
                    s += pairs(bias + j * a.bias_column, a.bias_column, there - j);
#endif
#if ADDITIVE_MASK
                    s += pairs(mask + j * a.mask_column, a.mask_column, there - j);
#endif
#if NATURAL
                    s *= 1.442695041f;
#endif
#if V_PER_TOKEN
                    // V's scale joins the exponent, so that P is rounded with its weight; the weight is taken out of l again
                    s += load(t.log2_weight + j);
#endif
#if BOOLEAN_MASK
                    s = where(pairs(mask + j * a.mask_column, a.mask_column, there - j) != 0, s, all(NOTHING));
#endif
                    if (edge) {
                        ints at = counted_from(j);
                        s = where(at < keys, s, all(NOTHING));
#if RIGHT
                        s = where(at <= int(most(-1, least(TILE, own + a.right))), s, all(NOTHING));
#endif
#if LEFT
                        s = where(at >= int(most(0, least(TILE, own - a.left))), s, all(NOTHING));
#endif
                    }
                    store(&t.s[i][j], s);
                    top = maximum(top, s);
                }
                largest[i] = largest_of(top);
            }

            // the maxima that P is scaled to, for all rows at once
            floats now = load(largest), m = maximum(load(t.m + g), now), before = load(t.r + g);
#if UNIT
            floats reference = m;
#else
            floats reference = maximum(now, m - 64.f);
#endif
            // up by an ulp, so that rounding never gives a code above the largest
            reference += magnitude(reference) * 1.1920928955078125e-07f;
            // a fully masked tile leaves the reference as it is
            reference = where(now == NOTHING, before, reference);
            floats fall = before - reference;
            store(alpha, exp2_of(where(fall > 65.f, all(65.f), fall)));
            store(base, reference - LOG2_LARGEST);
            store(t.m + g, m);
            store(t.r + g, reference);

            // P in units of its codes, and its sums over the tile
            for (int i = 0; i < count; i++) {
                floats total = all(0);
#if V_TILE_ZERO
                floats sum = all(0);
#endif
#if V_TOKEN_ZERO
                floats zero = all(0);
#endif
                for (int j = 0; j < columns * LANES; j += LANES) {
                    floats p = exp2_of(load(&t.s[i][j]) - base[i]);
#if INTEGER_V
                    store_codes(&t.p[i][j], p);
#else
#if BFLOAT_V
                    store_bfloats(&t.p[i][j / 2], encode_p(p));
#else
                    store(&t.p[i][j], encode_p(p));
#endif
#endif
#if QUANTIZED_NORMALIZER
                    floats code = encode_p(p);
#endif
#if V_PER_TOKEN
                    floats inverse = load(t.inverse_weight + j);
                    p *= inverse;
#if QUANTIZED_NORMALIZER
                    code *= inverse;
#endif
#endif
#if QUANTIZED_NORMALIZER
                    total += code + (p - p);  // codes of integers cannot hold NaN, p - p can
#else
                    total += p;
#endif
#if V_TILE_ZERO
                    sum += p;
#endif
#if V_TOKEN_ZERO
                    zero += p * load(t.v_zero + j);
#endif
                }
                t.l[g + i] = t.l[g + i] * alpha[i] + sum_of(total);
#if INTEGER_V
                t.flipped[i] = 0;
                for (int j = 0; FLIPPED && j < columns * LANES; j++) t.flipped[i] -= FLIPPED * t.p[i][j];
#endif
#if V_TOKEN_ZERO
                t.zero[g + i] = t.zero[g + i] * alpha[i] + sum_of(zero);
#endif
#if V_TILE_ZERO
                t.sum[g + i] = sum_of(sum);
#endif
            }

            // acc = acc * alpha + P V
            in_rows(count, [&](auto R, int i) {
                in_panels<R.value <= 4 && INTEGER_V && V_BITS == 8 ? 1 : PANELS>(CHANNELS, [&](auto W, int64_t at) {
#if V_UNPACKED
                    Values* panel = t.v + (alone ? 0 : at) * V_STEPS * LANES;
                    for (; v_unpacked < at + W.value; v_unpacked += V_AT_ONCE)
                        unpack_values(panel + (v_unpacked - at) * V_STEPS * LANES, t, tile.v, v_unpacked, v_ahead);
#else
                    const Values* panel = (const Values*)(tile.v + at * V_PANEL);
#endif
                    const auto add = [=, &t, &largest, &alpha](int r, int w, floats product) {
#if V_PER_TILE
                        if (largest[i + r] == NOTHING) return;
                        product *= load(t.v_scale + (at + w) * LANES);
#endif
#if V_TILE_ZERO
                        product += t.sum[g + i + r] * load(t.v_zero + (at + w) * LANES);
#endif
                        float* acc = &t.acc[g + i + r][(at + w) * LANES];
                        store(acc, load(acc) * alpha[i + r] + product);
                    };
#if INTEGER_V
                    const int lines = (keys * V_BITS + 31) / 32;
                    const auto then = [=, &t](int r, int w, ints sum) {
                        add(r, w, to_floats(FLIPPED ? sum + t.flipped[i + r] : sum) * V_UNIT);
                    };
                    multiply<V_BITS, R.value, W.value>(t.p[i], TILE, panel, 4 * V_PANEL, lines, v_ahead, then);
#else
                    const int steps = BFLOAT_V ? (keys + 1) / 2 : keys;
                    const auto then = [=, &t](int r, int w, floats sum, bool finite) {
                        add(r, w, finite ? sum : kept(sum, t.p[i + r], panel + w * LANES * V_STEPS, steps));
                    };
                    multiply<R.value, W.value>(t.p[i], V_STEPS, panel, LANES * V_STEPS, steps, then);
#endif
                });
            });
        }
    }
}
