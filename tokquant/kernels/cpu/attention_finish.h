// After the last key: the sums are normalized to outputs, and partial sums of other threads are merged.
#if V_ROTATED
// x times a Hadamard matrix, which undoes V's rotation, by butterflies from stride 1
static void hadamard(float* x) {
    for (int stride = 1; stride < ROTATION; stride *= 2)
        for (int first = 0; first < D; first += 2 * stride)
            for (int i = first; i < first + stride; i++) {
                float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
    for (int i = 0; i < D; i++) x[i] *= ROTATION_NORM;
}
#endif

// The rows' sums -> outputs and LSE. Undoes what was done to V: its scales and zeros, rotation and mean.
static void finish(const Arguments& a, int64_t batch, int64_t kv_head, int64_t first, int rows, Scratch& t) {
    const int64_t shared = a.heads / a.kv_heads, row = (batch * a.heads + kv_head * shared) * a.n_q + first;
    const int64_t kv = batch * a.kv_heads + kv_head;
    (void)kv;
    for (int i = 0; i < rows; i++) {
        auto* out = a.out + (row + i) * D;
        const float l = t.l[i];
        float lowered = 0, total = l;
#if LOWERED_LOGITS
        if (l != 0) lowered = a.logit_offset[row + i] * a.scale;
#endif
#if WITH_LSE
        // natural logarithm, without sinks; -inf for a row that attends to nothing
        float lse = (t.r[i] + std::log2(l) - LOG2_LARGEST) * 0.6931471806f + lowered;
#endif
#if BESIDE
        const float other = a.lse[row + i], top = other > lse ? other : lse, reference = top == NOTHING ? 0 : top;
        const float weight = std::exp(lse - reference), other_weight = std::exp(other - reference);
        const float sum = weight + other_weight, divisor = sum == 0 ? 1 : sum;
        lse = reference + std::log(sum);
#endif
#if WITH_LSE
        a.lse[row + i] = lse;
#endif
#if SINKS
        // a sink takes part in the softmax's sum and adds nothing to the output
        total += std::exp2((a.sinks[kv_head * shared + (first + i) / a.n_q] - lowered) * 1.442695041f - t.r[i] + LOG2_LARGEST);
#endif
        (void)lowered;
        float* acc = t.acc[i];
        for (int d = 0; d < D; d++) {
            acc[d] /= total;
#if V_ON_OUTPUT
            acc[d] *= a.v_scale[kv * WIDE + d];
#endif
#if V_TOKEN_ZERO
            acc[d] += t.zero[i] / total;
#endif
#if V_OUTPUT_ZERO
            acc[d] += l / total * a.v_zero[kv * WIDE + d];
#endif
        }
#if V_ROTATED
        hadamard(acc);
#endif
        for (int d = 0; d < D; d++) {
#if V_MEAN
            acc[d] += a.v_mean[kv * WIDE + d] * (l / total);
#endif
            // 0 for a row that attends to nothing, even if V is not finite
            acc[d] = l == 0 ? 0 : acc[d];
#if BESIDE
            acc[d] = (acc[d] * weight + out[d] * other_weight) / divisor;
#endif
#if !ROUNDED_OUTPUT
            out[d] = acc[d];
#endif
        }
#if ROUNDED_OUTPUT
        for (int d = 0; d < D; d += LANES) {
            uint16_t bits[LANES];
            store_low(bits, as_output(load(acc + d)));
            std::memcpy(out + d, bits, 2 * least(LANES, D - d));
        }
#endif
    }
}

// Partial sums over a chunk of keys, to be merged with those of other chunks. A row holds acc, r, l, and the sum of V's zeros.
constexpr int KEPT = WIDE + 3;

static void keep(const Scratch& t, int rows, float* to) {
    for (int i = 0; i < rows; i++, to += KEPT) {
        std::memcpy(to, t.acc[i], sizeof t.acc[i]);
        to[WIDE] = t.r[i], to[WIDE + 1] = t.l[i];
#if V_TOKEN_ZERO
        to[WIDE + 2] = t.zero[i];
#endif
    }
}

static void merge(const float* kept, int64_t chunks, int rows, Scratch& t) {
    for (int i = 0; i < rows; i++) {
        float r = NOTHING;
        for (int64_t c = 0; c < chunks; c++) {
            const float* own = kept + (c * rows + i) * KEPT;
            if (own[WIDE + 1] != 0 && own[WIDE] > r) r = own[WIDE];
        }
        t.r[i] = r == NOTHING ? 0 : r;
        t.l[i] = 0;
        std::memset(t.acc[i], 0, sizeof t.acc[i]);
#if V_TOKEN_ZERO
        t.zero[i] = 0;
#endif
        for (int64_t c = 0; c < chunks; c++) {
            const float* own = kept + (c * rows + i) * KEPT;
            if (own[WIDE + 1] == 0) continue;  // the row sees no key of this chunk
            const float weight = std::exp2(own[WIDE] - t.r[i]);
            t.l[i] += own[WIDE + 1] * weight;
            for (int d = 0; d < WIDE; d++) t.acc[i][d] += own[d] * weight;
#if V_TOKEN_ZERO
            t.zero[i] += own[WIDE + 2] * weight;
#endif
        }
    }
}
