// The arguments of a call. The caller in Python parses this struct, so it knows their names, types and order from here.
struct Arguments {
    int64_t batch;
    int64_t heads;
    int64_t n;  // tokens of each sequence
    int64_t threads;
    const SOURCE* x;  // [B, H, N, D], the last dimension contiguous
    int64_t x_batch;
    int64_t x_head;
    int64_t x_row;
    const int32_t* table;  // page table [B, pages]; or null, and each sequence is one page
    int64_t pages;
    int64_t page;  // tokens of a page
    const int32_t* first;  // [B], the position of each sequence's first new token; or null, and all begin at 0
#if QUERIES
    uint8_t* codes;  // [B, H, N, bytes]
#endif
#if KEYS || VALUES
    uint32_t* codes;  // panels; only the codes of these tokens are written
    int64_t codes_page;  // stride of a page, in words,
    int64_t codes_head;  // and of a head
#endif
#if SCALED
    SCALE_TYPE* scale;
    int64_t scale_page;  // stride of a page, in scales,
    int64_t scale_head;  // and of a head
#endif
#if ASYMMETRIC
    SCALE_TYPE* zero;
#endif
#if OFFSET
    const float* offset;  // to subtract [B, H, rows, D]
    int64_t offset_batch;  // stride of a sequence, in numbers
    int64_t offset_rows;
#endif
#if BALANCED
    const float* balance;  // [B, H, D]
    int64_t balance_batch;  // stride of a sequence, in numbers
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
    int8_t* met;  // the unpacked codes that products read [B, H, N, D]
#endif
#if MET_FLOATS
    float* met;  // the decoded values that products read [B, H, N, D]
#endif
#if CODE_SUM
    float* code_sum;  // sums of codes over channels [B, H, N]
#endif
#if TILE_SUMS
    int32_t* code_sum;  // sums of codes over a tile's tokens [B, H, tiles, D]; sequences begin at 0
#endif
#if CHECKED
    int32_t* lost;  // set to 1 if a value overflows its type
#endif
};
