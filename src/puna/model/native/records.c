// Where a paged cache keeps keys and values, and how new ones are written.
//
// Blocks of BLOCK tokens lie at absolute positions: logical block j holds positions 32 j to 32 j + 31. A block's record
// for one layer and key/value head is keys [head_dim][32], values [32][head_dim], and for INT8 a float32 scale a token
// for the keys [32] and for the values [32].

enum { BLOCK = 32, WIDEST = 256 };  // tokens a block; the largest head_dim

typedef struct {
    char *pool;                            // this layer's records
    long block_bytes, record_bytes;        // from one block to the next; from one head to the next
    long chunk;                            // a position sees its own chunk only; 0: everything before it
    long spans;                            // sequences
    const int64_t *starts, *counts;        // [spans] position of the first new token; new tokens
    const int32_t *const *tables;          // [spans] block ids by logical block
    const void *q, *k, *v;                 // [rows][heads or kv_heads][head_dim], rows of all spans in order
    void *out;                             // [rows][heads][head_dim], contiguous
    long q_stride, k_stride, v_stride;     // elements from one row to the next
    int kind;                              // of the pool: FLOAT32, BFLOAT16, INT8
    int bf16;                              // q, k, v and out: bfloat16, else float32
    int heads, kv_heads, head_dim, threads;
    int failed;                            // set to 1 where memory ran out
} Attention;

INLINE char *record(const Attention *a, long span, long block, int head) {
    return a->pool + a->tables[span][block] * a->block_bytes + head * a->record_bytes;
}
INLINE long size_of(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }
INLINE v16f load_kv(const char *p, long i, int kind) {
    return kind == INT8 ? load_i8((const int8_t *)p + i) : load_any(p, i, kind == BFLOAT16);
}
INLINE v16f load_kv_tail(const char *p, long i, long end, int kind) {
    char padded[64] = {0};
    memcpy(padded, p + i * size_of(kind), (end - i) * size_of(kind));
    return load_kv(padded, 0, kind);
}
INLINE void widen(const void *x, float *out, long count, int kind) {  // out has room for whole groups of sixteen
    long i = 0;
    for (; i + 16 <= count; i += 16) vstore(out + i, load_kv(x, i, kind));
    if (i < count) vstore(out + i, load_kv_tail(x, i, count, kind));
}

// x rounded to int8, returns the scale; not finite where x is not.
static float NAME(quantise)(const float *x, int8_t *out, long stride, long count) {
    float top = 0, spoilt = 0;
    for (long d = 0; d < count; d++) {
        float size = __builtin_fabsf(x[d]);
        top = size > top ? size : top;
        spoilt += x[d] * 0;
    }
    float inverse = top > 1e-30f ? 127 / top : 0;
    for (long d = 0; d < count; d++) out[d * stride] = (int8_t)__builtin_lrintf(x[d] * inverse);
    return top / 127 + spoilt;
}

static void NAME(write_token)(const Attention *a, char *to, long slot, const char *k, const char *v) {
    float keys[WIDEST], values[WIDEST];
    long width = a->head_dim, size = size_of(a->kind);
    widen(k, keys, width, a->bf16), widen(v, values, width, a->bf16);
    if (a->kind == INT8) {
        float *scales = (float *)(to + 2 * BLOCK * width);
        scales[slot] = NAME(quantise)(keys, (int8_t *)to + slot, BLOCK, width);
        scales[BLOCK + slot] = NAME(quantise)(values, (int8_t *)to + BLOCK * width + slot * width, 1, width);
        return;
    }
    char *value = to + (BLOCK + slot) * width * size;
    uint16_t halves[WIDEST];
    if (a->kind == FLOAT32) {
        for (long d = 0; d < width; d++) ((float *)to)[d * BLOCK + slot] = keys[d];
        memcpy(value, values, width * size);
        return;
    }
    for (long d = 0; d < width; d += 16) store_bf16(halves + d, vload(keys + d));
    for (long d = 0; d < width; d++) ((uint16_t *)to)[d * BLOCK + slot] = halves[d];
    for (long d = 0; d < width; d += 16) store_bf16(halves + d, vload(values + d));
    memcpy(value, halves, width * size);
}

// The new tokens of a span that lie in one logical block, all heads.
static void NAME(write_block)(const Attention *a, long span, long row, long block) {
    long start = a->starts[span], first = block * BLOCK > start ? block * BLOCK : start;
    long end = start + a->counts[span], size = a->bf16 ? 2 : 4;
    end = end < (block + 1) * BLOCK ? end : (block + 1) * BLOCK;
    for (int head = 0; head < a->kv_heads; head++)
        for (long at = first; at < end; at++) {
            long from = row + at - start, offset = (long)head * a->head_dim;
            NAME(write_token)(a, record(a, span, block, head), at % BLOCK,
                              (const char *)a->k + (from * a->k_stride + offset) * size,
                              (const char *)a->v + (from * a->v_stride + offset) * size);
        }
}
