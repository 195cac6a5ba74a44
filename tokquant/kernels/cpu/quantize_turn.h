// Transforms tokens to the frame in which they are quantized: offset, balance, rotation and folded scales applied.
#if ROTATED
// y times a Hadamard matrix, not normalized, by butterflies from stride 1
template <int STRIDE>
static inline void butterflies(float* y) {
    if (STRIDE >= ROTATION) return;
    if (STRIDE < LANES) {
        const ints minus = where((counted_from(0) & STRIDE) != 0, ints{} + INT32_MIN, ints{});
        for (int d = 0; d < WIDE; d += LANES) {
            floats x = load(y + d);
            store(y + d, swapped<STRIDE % LANES>(x) + as_floats(as_ints(x) ^ minus));
        }
    } else {
        for (int first = 0; first < D; first += 2 * STRIDE)
            for (int d = first; d < first + STRIDE; d += LANES) {
                floats a = load(y + d), b = load(y + d + STRIDE);
                store(y + d, a + b);
                store(y + d + STRIDE, a - b);
            }
    }
    butterflies<STRIDE < ROTATION ? 2 * STRIDE : STRIDE>(y);
}
#endif

// Transforms tokens `lo` to `hi` of a chunk, which begins at index `token` of the tensor: negative if it begins before that.
static void turn(const Arguments& a, int64_t batch, int64_t head, int64_t token, int lo, int hi, Scratch& t) {
    const SOURCE* x = a.x + batch * a.x_batch + head * a.x_head + token * a.x_row;
    const int64_t plane = batch * a.heads + head;
    (void)plane;
#if OFFSET
    const float* offset = a.offset + batch * a.offset_batch + (head * a.offset_rows + most(token, 0) / OFFSET_TOKENS) * D;
#endif
#if BALANCED
    const float* balance = a.balance + batch * a.balance_batch + head * D;
#endif
    for (int i = lo; i < hi; i++) {
        const SOURCE* row = x + i * a.x_row;
        float* to = t.y[i];
#if LOGITS
        floats logit = all(0);
#endif
        for (int d = 0; d < WIDE; d += LANES) {
            floats y = load(row + d, D - d);
#if K_OFFSET
            logit += y * load(a.k_offset + plane * D + d, D - d);
#endif
#if OFFSET
            y = y - load(offset + d, D - d);
#endif
#if BALANCED
            y = y * load(balance + d, D - d);
#endif
            store(to + d, y);
        }
#if ROTATED
        butterflies<1>(to);
        for (int d = 0; d < WIDE; d += LANES) store(to + d, load(to + d) * ROTATION_NORM);
#endif
#if K_ORIGIN
        for (int d = 0; d < WIDE; d += LANES) logit += load(to + d) * load(a.k_origin + plane * D + d, D - d);
#endif
#if FOLDED
        for (int d = 0; d < WIDE; d += LANES) store(to + d, load(to + d) * load(a.fold + plane * D + d, D - d));
#endif
#if LOGITS
        a.logit_offset[plane * a.n + token + i] = sum_of(logit);
#endif
    }
}
