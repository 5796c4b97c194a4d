// A vision tower between its products: each row, and each head of a picture, by itself, so its bits don't depend on what
// is computed beside it.

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

// Attention computes in units of four bytes: an element in float32, or where the processor multiplies bfloat16 (and that is
// the stream) a pair of neighbours: of a head's elements for scores, of keys for the weighted values.
#if AVX512
enum { PAIRS = 1, SCORED = 8, KEPT = 4, MOST_COLUMNS = 6 };  // rows at once; groups of sixteen head elements in registers
INLINE v16f unit_sum(v16f sum, v16i a, v16i b, int pairs) {
    return pairs ? dot2(sum, a, b) : vfma(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
INLINE void store_units(float *units, long i, v16f x, int pairs) {  // of keys
    if (pairs) _mm256_storeu_si256((__m256i *)((uint16_t *)units + i), (__m256i)_mm512_cvtneps_pbh(x));
    else vstore(units + i, x);
}
#else
enum { PAIRS = 0, SCORED = 2, KEPT = 2, MOST_COLUMNS = 2 };
INLINE v16f unit_sum(v16f sum, v16i a, v16i b, int pairs) {
    (void)pairs;
    return vfma((v16f){_mm256_castsi256_ps(a.l), _mm256_castsi256_ps(a.h)},
                (v16f){_mm256_castsi256_ps(b.l), _mm256_castsi256_ps(b.h)}, sum);
}
INLINE void store_units(float *units, long i, v16f x, int pairs) {
    (void)pairs;
    vstore(units + i, x);
}
#endif

typedef struct {
    long units, blocks, steps, padded;  // of a head's elements, of 32 keys, of keys; head elements up to whole sixteens
    int32_t *keys, *values, *queries;   // [blocks][units][32], [steps][padded], [SCORED][units]
    float *weights, *sums;              // [SCORED][blocks * 32], in units of keys once they are weights; [SCORED]
} Head;

INLINE void look_units(const char *x, int32_t *out, long width, int bf16, int pairs) {
    if (pairs) memcpy(out, x, width * 2);
    else widen(x, (float *)out, width, bf16);
}

// Scores of `rows` queries: each sum runs over the head's units in order.
INLINE void look_scores(const Head *h, int rows, int pairs) {
    const int32_t *keys = h->keys;
    for (long block = 0; block < h->blocks; block++) {
        v16f sum[SCORED][2];
        EACH(r, rows) sum[r][0] = sum[r][1] = vzero();
        for (long u = 0; u < h->units; u++, keys += BLOCK) {
            v16i low = iload(keys), high = iload(keys + 16);
            EACH(r, rows) {
                v16i x = ibroadcast(h->queries + r * h->units + u);
                sum[r][0] = unit_sum(sum[r][0], x, low, pairs), sum[r][1] = unit_sum(sum[r][1], x, high, pairs);
            }
        }
        EACH(r, rows) {
            float *out = h->weights + (r * h->blocks + block) * BLOCK;
            vstore(out, sum[r][0]), vstore(out + 16, sum[r][1]);
        }
    }
}

// e^(scale * (score - largest)) in place, for keys that there are; gives their sum.
INLINE float look_weights(float *w, long keys, long room, float scale, int pairs) {
    v16f most = vset(-__builtin_inff()), sum = vzero();
    for (long i = keys; i < room; i++) w[i] = -__builtin_inff();
    for (long i = 0; i < room; i += 16) most = vmax(most, vload(w + i));
    v16f top = vset(vmaximum(most)), by = vset(scale);
    for (long i = 0; i < room; i += 16) {
        v16f x = vexp(vmul(vsub(vload(w + i), top), by));
        sum = vadd(sum, x);
        store_units(w, i, x, pairs);
    }
    return vsum(sum);
}

// The weighted values of `rows` queries from `row` on, `columns` groups of sixteen elements from d on; keys in order.
INLINE void look_values(const Look *a, const Head *h, char *out, long row, long d, int rows, int columns, int pairs) {
    const int32_t *weights = (const int32_t *)h->weights + row * h->blocks * BLOCK, *values = h->values + d;
    long width = a->head_dim, line = a->heads * width * (a->bf16 ? 2 : 4);
    v16f sum[KEPT][MOST_COLUMNS];
    EACH(r, rows) EACH(c, columns) sum[r][c] = vzero();
    for (long t = 0; t < h->steps; t++, values += h->padded) {
        v16i x[MOST_COLUMNS];
        EACH(c, columns) x[c] = iload(values + c * 16);
        EACH(r, rows) {
            v16i w = ibroadcast(weights + r * h->blocks * BLOCK + t);
            EACH(c, columns) sum[r][c] = unit_sum(sum[r][c], w, x[c], pairs);
        }
    }
    EACH(r, rows) EACH(c, columns) {
        v16f x = vdiv(sum[r][c], vset(h->sums[row + r]));
        if (d + c * 16 + 16 <= width) store_any(out + (row + r) * line, d + c * 16, x, a->bf16);
        else store_tail(out + (row + r) * line, d + c * 16, width, x, a->bf16);
    }
}

INLINE void look_columns(const Look *a, const Head *h, char *out, long row, int rows, int pairs) {
    long d = 0;
    for (; d + MOST_COLUMNS * 16 <= h->padded; d += MOST_COLUMNS * 16) look_values(a, h, out, row, d, rows, MOST_COLUMNS, pairs);
    for (; d < h->padded; d += 16) look_values(a, h, out, row, d, rows, 1, pairs);
}

INLINE void look_rows(const Look *a, const Head *h, char *out, int rows, int pairs) {
    long row = 0;
    look_scores(h, rows, pairs);
    for (long r = 0; r < rows; r++)
        h->sums[r] = look_weights(h->weights + r * h->blocks * BLOCK, a->keys, h->blocks * BLOCK,
                                  1.0f / __builtin_sqrtf((float)a->head_dim), pairs);
    for (; row + KEPT <= rows; row += KEPT) look_columns(a, h, out, row, KEPT, pairs);
    for (; row < rows; row++) look_columns(a, h, out, row, 1, pairs);
}

// One head of a batch. What lies beyond the last key and the last element stays zero.
INLINE void look_head(const Look *a, const Head *h, long batch, long head, int pairs) {
    long width = a->head_dim, size = a->bf16 ? 2 : 4;
    const char *k = (const char *)a->k + (batch * a->k_batch + head * width) * size;
    const char *v = (const char *)a->v + (batch * a->v_batch + head * width) * size;
    const char *q = (const char *)a->q + (batch * a->q_batch + head * width) * size;
    char *out = (char *)a->out + (batch * a->queries * a->heads + head) * width * size;
    int32_t row[WIDEST] = {0};
    for (long n = 0; n < a->keys; n++) {
        int32_t *block = h->keys + n / BLOCK * BLOCK * h->units + n % BLOCK;
        look_units(k + n * a->k_stride * size, row, width, a->bf16, pairs);
        for (long u = 0; u < h->units; u++) block[u * BLOCK] = row[u];
    }
    for (long n = 0, line = a->v_stride * size; n < a->keys; n += pairs + 1) {
        int32_t *to = h->values + n / (pairs + 1) * h->padded;
        const uint16_t *one = (const uint16_t *)(v + n * line), *next = (const uint16_t *)(v + n * line + line);
        if (!pairs) look_units((const char *)one, to, width, a->bf16, 0);
        else if (n + 1 < a->keys) for (long d = 0; d < width; d++) to[d] = one[d] | (uint32_t)next[d] << 16;
        else for (long d = 0; d < width; d++) to[d] = one[d];
    }
    for (long start = 0; start < a->queries;) {
        int rows = a->queries - start < SCORED ? 1 : SCORED;
        for (long r = 0; r < rows; r++)
            look_units(q + (start + r) * a->q_stride * size, h->queries + r * h->units, width, a->bf16, pairs);
        char *to = out + start * a->heads * width * size;
        if (rows == SCORED) look_rows(a, h, to, SCORED, pairs);
        else look_rows(a, h, to, 1, pairs);
        start += rows;
    }
}

// softmax(q k / sqrt(head_dim)) v of every head: each query sees every key.
void NAME(look)(Look *a) {
    int pairs = PAIRS && a->bf16, failed = 0;
    long each = pairs ? 2 : 1, items = a->batches * a->heads;
    Head shape = {.units = (a->head_dim + each - 1) / each, .blocks = (a->keys + BLOCK - 1) / BLOCK,
                  .steps = (a->keys + each - 1) / each, .padded = rounded_up(a->head_dim)};
    long keys = shape.blocks * BLOCK * shape.units, values = shape.steps * shape.padded;
    long bytes = 4 * (keys + values + rounded_up(SCORED * shape.units) + SCORED * shape.blocks * BLOCK + 16);
#pragma omp parallel num_threads(a->threads) reduction(| : failed)
    {
        Head h = shape;
        char *memory = aligned_alloc(64, bytes);
        failed = !memory;
        if (memory) {
            memset(memory, 0, bytes);
            h.keys = (int32_t *)memory, h.values = h.keys + keys, h.queries = h.values + values;
            h.weights = (float *)(h.queries + rounded_up(SCORED * shape.units));
            h.sums = h.weights + SCORED * shape.blocks * BLOCK;
        }
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < items; i++)
            if (failed) continue;
            else if (pairs) look_head(a, &h, i / a->heads, i % a->heads, PAIRS);
            else look_head(a, &h, i / a->heads, i % a->heads, 0);
        free(memory);
    }
    a->failed = failed;
}
