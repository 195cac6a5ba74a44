// What a caller gives, by names that it reads from here.
struct Arguments {
    int64_t batch;
    int64_t heads;
    int64_t n;  // tokens of each sequence
    int64_t threads;
    const SOURCE* x;  // [B, H, N, D], the last dimension contiguous
    int64_t x_batch;
    int64_t x_head;
    int64_t x_row;
    const int32_t* table;  // of pages [B, pages], or nothing: then a sequence is a page of its own
    int64_t pages;
    int64_t page;  // tokens of one
    const int32_t* first;  // the place of each sequence's first token, 0 where there is nothing
#if QUERIES
    uint8_t* codes;  // [B, H, N, bytes]
#endif
#if KEYS || VALUES
    uint32_t* codes;  // panels; only what belongs to these tokens is written
    int64_t codes_page;  // words to the next page,
    int64_t codes_head;  // and to the next head
#endif
#if SCALED
    SCALE_TYPE* scale;
    int64_t scale_page;  // scales to the next page,
    int64_t scale_head;  // and to the next head
#endif
#if ASYMMETRIC
    SCALE_TYPE* zero;
#endif
#if OFFSET
    const float* offset;  // [B, H, rows, D]
    int64_t offset_batch;  // numbers to the next sequence
    int64_t offset_rows;
#endif
#if BALANCED
    const float* balance;  // [B, H, D]
    int64_t balance_batch;  // numbers to the next sequence
#endif
#if FOLDED
    const float* fold;  // [B, H, D]
#endif
#if K_OFFSET
    const float* k_offset;  // [B, H, D]
#endif
#if K_ORIGIN
    const float* k_origin;  // [B, H, D]
#endif
#if LOGITS
    float* logit_offset;  // [B, H, N]
#endif
#if MET_BYTES
    int8_t* met;  // [B, H, N, D]
#endif
#if MET_FLOATS
    float* met;  // [B, H, N, D]
#endif
#if CODE_SUM
    float* code_sum;  // [B, H, N]
#endif
#if TILE_SUMS
    int32_t* code_sum;  // [B, H, tiles, D], of sequences that begin at 0
#endif
#if CHECKED
    int32_t* lost;  // set to 1 where a type does not hold a value
#endif
};
