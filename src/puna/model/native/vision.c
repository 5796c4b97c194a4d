// A vision tower between its products: each row, and each head of a picture, by itself, so its bits don't depend on what
// is computed beside it. Attention is that of attention.c, with every query standing behind the last key.

// x * P(a normal number < x): max(x, 0) - |x| * (1 - erf(|x| / sqrt 2)) / 2, the last factor by Abramowitz and Stegun
// 7.1.26 (absolute error below 1.5e-7).
INLINE v16f gelu(v16f x) {
    v16f size = vmax(x, vsub(vzero(), x)), z = vmul(size, vset(0.70710678f));
    v16f t = vdiv(vset(1.0f), vfma(z, vset(0.3275911f), vset(1.0f)));
    v16f sum = vfma(t, vset(1.061405429f), vset(-1.453152027f));
    sum = vfma(t, sum, vset(1.421413741f));
    sum = vfma(t, sum, vset(-0.284496736f));
    sum = vfma(t, sum, vset(0.254829592f));
    v16f tail = vmul(vmul(t, sum), vmul(vset(0.5f), vexp(vsub(vzero(), vmul(z, z)))));
    return vsub(vmax(x, vzero()), vmul(size, tail));
}

INLINE void bias_gelu_row(void *x, const void *bias, long width, int bf16) {
    for (long i = 0; i < width; i += 16) {
        if (i + 16 <= width) store_any(x, i, gelu(rounded(vadd(load_any(x, i, bf16), load_any(bias, i, bf16)), bf16)), bf16);
        else {
            v16f v = rounded(vadd(load_tail(x, i, width, bf16), load_tail(bias, i, width, bf16)), bf16);
            store_tail(x, i, width, gelu(v), bf16);
        }
    }
}

// x = gelu(x + bias) [rows, width], in place.
void NAME(bias_gelu)(void *x, const void *bias, long rows, long width, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        if (bf16) bias_gelu_row((char *)x + r * size, bias, width, 1);
        else bias_gelu_row((char *)x + r * size, bias, width, 0);
    }
}

INLINE void bias_add_row(void *x, const void *bias, const void *to, long width, int bf16) {
    for (long i = 0; i < width; i += 16) {
        if (i + 16 <= width) {
            v16f v = rounded(vadd(load_any(x, i, bf16), load_any(bias, i, bf16)), bf16);
            store_any(x, i, vadd(load_any(to, i, bf16), v), bf16);
        } else {
            v16f v = rounded(vadd(load_tail(x, i, width, bf16), load_tail(bias, i, width, bf16)), bf16);
            store_tail(x, i, width, vadd(load_tail(to, i, width, bf16), v), bf16);
        }
    }
}

// x = to + (x + bias) [rows, width], in place.
void NAME(bias_add)(void *x, const void *bias, const void *to, long rows, long width, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        if (bf16) bias_add_row((char *)x + r * size, bias, (const char *)to + r * size, width, 1);
        else bias_add_row((char *)x + r * size, bias, (const char *)to + r * size, width, 0);
    }
}

INLINE void layer_norm_row(const void *x, const void *weight, const void *bias, void *out, long width, float eps,
                           int bf16) {
    v16f sum = vzero(), squares = vzero();
    long whole = width & -16L, i;
    for (i = 0; i < whole; i += 16) sum = vadd(sum, load_any(x, i, bf16));
    if (i < width) sum = vadd(sum, load_tail(x, i, width, bf16));
    v16f mean = vset(vsum(sum) / (float)width);
    for (i = 0; i < whole; i += 16) {
        v16f gap = vsub(load_any(x, i, bf16), mean);
        squares = vfma(gap, gap, squares);
    }
    float variance = vsum(squares);
    if (i < width) {
        float last[16];
        vstore(last, vsub(load_tail(x, i, width, bf16), mean));
        for (long d = 0; d < width - i; d++) variance += last[d] * last[d];
    }
    v16f scale = vset(1.0f / __builtin_sqrtf(variance / (float)width + eps));
    for (i = 0; i < whole; i += 16) {
        v16f v = vmul(vsub(load_any(x, i, bf16), mean), scale);
        store_any(out, i, vfma(v, load_any(weight, i, bf16), load_any(bias, i, bf16)), bf16);
    }
    if (i < width) {
        v16f v = vmul(vsub(load_tail(x, i, width, bf16), mean), scale);
        v = vfma(v, load_tail(weight, i, width, bf16), load_tail(bias, i, width, bf16));
        store_tail(out, i, width, v, bf16);
    }
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias [rows, width].
void NAME(layer_norm)(const void *x, const void *weight, const void *bias, void *out, long rows, long width, float eps,
                      int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        const char *row = (const char *)x + r * size;
        if (bf16) layer_norm_row(row, weight, bias, (char *)out + r * size, width, eps, 1);
        else layer_norm_row(row, weight, bias, (char *)out + r * size, width, eps, 0);
    }
}

typedef struct {  // strides in elements; heads lie side by side in a row
    const void *q, *k, *v;
    void *out;  // [batches, queries, heads, head_dim]
    long batches, queries, keys, q_batch, k_batch, v_batch, q_stride, k_stride, v_stride;
    int heads, head_dim, bf16, threads, failed;
} Look;

// One head: keys as blocks [head_dim][32], values as rows [padded], both in float32; then 32 queries at a time.
static void NAME(look_head)(const Look *a, long batch, long head, Tile *t, float *keys, float *values) {
    long width = a->head_dim, size = a->bf16 ? 2 : 4, blocks = (a->keys + BLOCK - 1) / BLOCK;
    float scale = 1.0f / __builtin_sqrtf((float)width), row[WIDEST];
    const char *k = (const char *)a->k + (batch * a->k_batch + head * width) * size;
    const char *v = (const char *)a->v + (batch * a->v_batch + head * width) * size;
    const char *q = (const char *)a->q + (batch * a->q_batch + head * width) * size;
    char *out = (char *)a->out + (batch * a->queries * a->heads + head) * width * size;
    memset(keys + (blocks - 1) * BLOCK * width, 0, BLOCK * width * sizeof(float));
    for (long n = 0; n < a->keys; n++) {
        float *block = keys + n / BLOCK * BLOCK * width + n % BLOCK;
        widen(k + n * a->k_stride * size, row, width, a->bf16);
        for (long d = 0; d < width; d++) block[d * BLOCK] = row[d];
        widen(v + n * a->v_stride * size, values + n * t->padded, width, a->bf16);
    }
    t->first = a->keys - 1;
    for (long start = 0; start < a->queries; start += TILE_ROWS) {
        t->rows = t->group = a->queries - start < TILE_ROWS ? a->queries - start : TILE_ROWS;
        for (long r = 0; r < t->rows; r++) {
            widen(q + (start + r) * a->q_stride * size, row, width, a->bf16);
            for (long d = 0; d < width; d++) t->q[r * Q_STRIDE + d] = row[d] * scale;
            t->top[r] = -__builtin_inff();
        }
        memset(t->sum, 0, t->rows * 16 * sizeof(float));
        memset(t->acc, 0, t->rows * t->padded * sizeof(float));
        for (long block = 0; block < blocks; block++)
            attend_block(t, (char *)(keys + block * BLOCK * width), (char *)(values + block * BLOCK * t->padded), t->padded,
                         0, block * BLOCK, 0, width, 0, t->rows, FLOAT32, 0);
        for (long r = 0; r < t->rows; r++) {
            v16f sum = vset(vsum(vload(t->sum + r * 16)));
            char *to = out + (start + r) * a->heads * width * size;
            for (long d = 0; d < width; d += 16) {
                v16f x = vdiv(vload(t->acc + r * t->padded + d), sum);
                if (d + 16 <= width) store_any(to, d, x, a->bf16);
                else store_tail(to, d, width, x, a->bf16);
            }
        }
    }
}

// softmax(q k / sqrt(head_dim)) v of every head: each query sees every key.
void NAME(look)(Look *a) {
    long padded = rounded_up(a->head_dim), blocks = (a->keys + BLOCK - 1) / BLOCK, items = a->batches * a->heads;
    int failed = 0;
#pragma omp parallel num_threads(a->threads) reduction(| : failed)
    {
        Tile tile = {.padded = padded};
        float *buffers = NAME(tile_buffers)(&tile, TILE_ROWS, a->head_dim);
        float *memory = aligned_alloc(64, blocks * BLOCK * (a->head_dim + padded) * sizeof(float));
        failed = !buffers || !memory;
        if (memory) memset(memory + blocks * BLOCK * a->head_dim, 0, blocks * BLOCK * padded * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < items; i++)
            if (!failed) NAME(look_head)(a, i / a->heads, i % a->heads, &tile, memory, memory + blocks * BLOCK * a->head_dim);
        free(buffers), free(memory);
    }
    a->failed = failed;
}
