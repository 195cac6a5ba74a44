// The arguments of a call. The caller in Python parses this struct, so it knows their names, types and order from here.
struct Arguments {
    int64_t batch;
    int64_t heads;
    int64_t kv_heads;
    int64_t n_q;
    int64_t n_k;
    int64_t threads;
    float scale;
    const int32_t* table;  // page table [B, pages]; or null, and each sequence is one page
    int64_t pages;
    int64_t page;  // tokens of a page
    const int32_t* lengths;  // [B], keys of each sequence; or null, and all have n_k
    const int32_t* newer;  // [B], newer keys that are kept outside of the pages; or null
#if INTEGER_K
    const int8_t* q;  // codes [B, H, N_q, D]
#else
    const float* q;  // values [B, H, N_q, D]
#endif
    const uint32_t* k;  // codes in panels of 16 tokens
    int64_t k_page;  // stride of a page, in words,
    int64_t k_head;  // and of a head
    const uint32_t* v;  // codes in panels of 16 channels, tile after tile
    int64_t v_page;
    int64_t v_head;
#if ROUNDED_OUTPUT
    uint16_t* out;  // bits [B, H, N_q, D]
#else
    float* out;  // [B, H, N_q, D]
#endif
#if WITH_LSE
    float* lse;  // [B, H, N_q]
#endif
#if Q_SCALED
    const float* q_scale;  // [B, H, N_q]
#endif
#if K_SCALED || K_DECODED
    const K_SCALE_TYPE* k_scale;
    int64_t k_scale_page;  // stride of a page, in scales,
    int64_t k_scale_head;  // and of a head
#endif
#if K_ZERO || K_DECODED_ZERO
    const K_SCALE_TYPE* k_zero;
#endif
#if K_ZERO
    const float* q_sum;  // sums of Q's codes over channels [B, H, N_q]
#endif
#if V_PER_TOKEN || V_PER_TILE || V_DECODED
    const V_SCALE_TYPE* v_scale;  // negative for a token whose codes are all zero
    int64_t v_scale_page;
    int64_t v_scale_head;
#endif
#if V_TOKEN_ZERO || V_TILE_ZERO || V_DECODED_ZERO
    const V_SCALE_TYPE* v_zero;
#endif
#if V_ON_OUTPUT
    const float* v_scale;  // [B, H_kv, channels], D rounded up to 16
#endif
#if V_OUTPUT_ZERO
    const float* v_zero;
#endif
#if V_MEAN
    const float* v_mean;  // [B, H_kv, channels]
#endif
#if BLOCK_MEANS
    const float* q_mean;  // [B, H, ceil(N_q / 128), D]
    const float* companion;  // K minus its offset, unquantized, in panels of floats
#endif
#if LOWERED_SOFTCAP || LOWERED_LOGITS
    const float* logit_offset;  // q . c [B, H, N_q]
#endif
#if LEFT
    int64_t left;  // keys that a query sees before its own position,
#endif
#if RIGHT
    int64_t right;  // and after it
#endif
#if SOFTCAP
    float softcap;
#endif
#if SINKS
    const float* sinks;  // [H]
#endif
#if BOOLEAN_MASK
    const uint8_t* mask;  // nonzero where a query attends to a key
#endif
#if ADDITIVE_MASK
    const float* mask;
#endif
#if BOOLEAN_MASK || ADDITIVE_MASK
    int64_t mask_batch;
    int64_t mask_head;
    int64_t mask_row;
    int64_t mask_column;
#endif
#if ALIBI
    const float* slopes;  // [H]
#endif
#if KEY_VECTOR
    const float* key_bias;
    int64_t key_bias_batch;
    int64_t key_bias_head;
#endif
#if LOWRANK
    const float* q_factors;  // [., ., N_q, R]
    int64_t q_factors_batch;
    int64_t q_factors_head;
    const float* k_factors;  // in panels
    int64_t k_factors_batch;
    int64_t k_factors_head;
#endif
#if DENSE_BIAS
    const float* bias;
    int64_t bias_batch;
    int64_t bias_head;
    int64_t bias_row;
    int64_t bias_column;
#endif
};
