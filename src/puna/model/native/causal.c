// Causal attention within segments and its gradients, for training: bfloat16 in and out, float32 sums.
//
// Everything is computed transposed, keys by queries, sixteen queries to a register: the softmax of a query then never
// leaves its lane. Tiles have 64 keys and 64 queries; what lies past a segment's end is zero and masked by causality.

enum { SIDE = 64 };

typedef struct {
    const uint16_t *q, *k, *v;      // [tokens][heads or kv_heads][head_dim]
    uint16_t *out;                  // [tokens][heads][head_dim], packed
    float *lse;                     // [heads][tokens]: log of the sum of e^score
    const uint16_t *above;          // gradient of out, packed; null in the forward part
    uint16_t *q_out, *k_out, *v_out;  // gradients, packed
    const int64_t *starts, *lengths;  // [segments], in tokens
    long segments, tokens, q_stride, k_stride, v_stride;  // strides: elements from one token to the next
    int heads, kv_heads, head_dim, threads;
    int failed;                     // set where there was no memory
} Causal;

// c [4][16 * vectors] (+)= a [4][pairs] times b [pairs][16 * vectors], of pairs of bfloat16.
INLINE void products(const uint32_t *a, long a_stride, const uint32_t *b, long b_stride, float *c, long c_stride,
                     long pairs, int vectors, int add) {
    v16f sum[4][4];
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < vectors; j++) sum[r][j] = add ? vload(c + r * c_stride + 16 * j) : vzero();
    for (long p = 0; p < pairs; p++) {
        v16i right[4];
        for (int j = 0; j < vectors; j++) right[j] = iload(b + p * b_stride + 16 * j);
        for (int r = 0; r < 4; r++) {
            v16i left = iset((int)a[r * a_stride + p]);
            for (int j = 0; j < vectors; j++) sum[r][j] = dot2(sum[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < vectors; j++) vstore(c + r * c_stride + 16 * j, sum[r][j]);
}

// c [rows][columns] (+)= a [rows][pairs] b [pairs][columns]; rows a multiple of 4, columns of 16.
static void NAME(tile_product)(const uint32_t *a, const uint32_t *b, float *c, long rows, long columns, long pairs, int add) {
    for (long i = 0; i < rows; i += 4) {
        long j = 0;
        for (; j + 64 <= columns; j += 64) products(a + i * pairs, pairs, b + j, columns, c + i * columns + j, columns, pairs, 4, add);
        for (; j < columns; j += 16) products(a + i * pairs, pairs, b + j, columns, c + i * columns + j, columns, pairs, 1, add);
    }
}

// Rows [rows][width] of a head as they are, as pairs by row [width / 2][SIDE], as pairs of rows [SIDE / 2][width], and
// transposed [width][SIDE]; zeros past `rows`.
static void copy_rows(const uint16_t *x, long stride, long rows, long width, uint16_t *out) {
    for (long r = 0; r < rows; r++) memcpy(out + r * width, x + r * stride, width * 2);
    memset(out + rows * width, 0, (SIDE - rows) * width * 2);
}
static void pairs_by_row(const uint16_t *x, long stride, long rows, long width, uint32_t *out) {
    memset(out, 0, width / 2 * SIDE * 4);
    for (long p = 0; p < width / 2; p++)
        for (long r = 0; r < rows; r++) memcpy(out + p * SIDE + r, x + r * stride + 2 * p, 4);
}
static void pairs_of_rows(const uint16_t *x, long stride, long rows, long width, uint32_t *out) {
    for (long p = 0; p < SIDE / 2; p++)
        for (long d = 0; d < width; d++) {
            uint32_t low = 2 * p < rows ? x[2 * p * stride + d] : 0, high = 2 * p + 1 < rows ? x[(2 * p + 1) * stride + d] : 0;
            out[p * width + d] = low | high << 16;
        }
}
static void transposed_rows(const uint16_t *x, long stride, long rows, long width, uint16_t *out) {
    memset(out, 0, width * SIDE * 2);
    for (long d = 0; d < width; d++)
        for (long r = 0; r < rows; r++) out[d * SIDE + r] = x[r * stride + d];
}

// x [width][SIDE] float32 back as rows of bfloat16.
static void NAME(store_transposed)(const float *x, long rows, long width, uint16_t *out, long stride) {
    for (long r = 0; r < rows; r++) {
        float row[WIDEST];
        for (long d = 0; d < width; d++) row[d] = x[d * SIDE + r];
        for (long d = 0; d < width; d += 16) store_bf16(out + r * stride + d, vload(row + d));
    }
}
static void NAME(store_rows)(const float *x, long rows, long width, uint16_t *out, long stride) {
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < width; d += 16) store_bf16(out + r * stride + d, vload(x + r * width + d));
}

// Two rows of sixteen as pairs: the first in the lower halves.
INLINE void store_pairs(uint32_t *p, v16f low, v16f high) {
    uint16_t a[16], b[16];
    store_bf16(a, low), store_bf16(b, high);
    for (int i = 0; i < 16; i++) p[i] = a[i] | (uint32_t)b[i] << 16;
}

static const float mask_steps[2 * SIDE] = {[0 ... SIDE - 1] = -1e30f};  // then zeros

static long tiles_of(long length) { return (length + SIDE - 1) / SIDE; }

// One query head over one segment.
static void NAME(causal_head)(const Causal *c, long start, long length, int head, const uint16_t *k, const uint16_t *v,
                              uint32_t *q, float *scores, float *sums, uint32_t *weights) {
    long width = c->head_dim, tiles = tiles_of(length), tile = SIDE * width;
    const float *steps = mask_steps + SIDE;
    v16f scale = vset(1.0f / __builtin_sqrtf((float)width));
    for (long i = 0; i < tiles; i++) {
        long rows = length - i * SIDE < SIDE ? length - i * SIDE : SIDE;
        pairs_by_row(c->q + (start + i * SIDE) * c->q_stride + head * width, c->q_stride, rows, width, q);
        v16f most[4], total[4];
        for (int n = 0; n < 4; n++) most[n] = vset(-1e30f), total[n] = vzero();
        for (long j = 0; j <= i; j++) {
            NAME(tile_product)((const uint32_t *)(k + j * tile), q, scores, SIDE, SIDE, width / 2, 0);
            v16f before[4];
            for (int n = 0; n < 4; n++) {
                before[n] = most[n];
                for (int r = 0; r < SIDE; r++) {
                    float *at = scores + r * SIDE + 16 * n;
                    v16f s = vmul(vload(at), scale);
                    if (i == j) s = vadd(s, vload(steps + 16 * n - r));
                    vstore(at, s);
                    most[n] = vmax(most[n], s);
                }
                before[n] = vexp(vsub(before[n], most[n]));
                total[n] = vmul(total[n], before[n]);
                for (int r = 0; r < SIDE; r += 2) {
                    v16f a = vexp(vsub(vload(scores + r * SIDE + 16 * n), most[n]));
                    v16f b = vexp(vsub(vload(scores + (r + 1) * SIDE + 16 * n), most[n]));
                    total[n] = vadd(total[n], vadd(a, b));
                    store_pairs(weights + r / 2 * SIDE + 16 * n, a, b);
                }
            }
            if (j)
                for (long d = 0; d < width; d++)
                    for (int n = 0; n < 4; n++) vstore(sums + d * SIDE + 16 * n, vmul(vload(sums + d * SIDE + 16 * n), before[n]));
            NAME(tile_product)((const uint32_t *)(v + j * tile), weights, sums, width, SIDE, SIDE / 2, j > 0);
        }
        float sum[SIDE], largest[SIDE];
        for (int n = 0; n < 4; n++) {
            vstore(sum + 16 * n, total[n]), vstore(largest + 16 * n, most[n]);
            v16f by = vdiv(vset(1.0f), total[n]);
            for (long d = 0; d < width; d++) vstore(sums + d * SIDE + 16 * n, vmul(vload(sums + d * SIDE + 16 * n), by));
        }
        long first = start + i * SIDE, stride = c->heads * width;
        for (long r = 0; r < rows; r++) c->lse[head * c->tokens + first + r] = largest[r] + __builtin_logf(sum[r]);
        NAME(store_transposed)(sums, rows, width, c->out + first * stride + head * width, stride);
    }
}

typedef struct { char *at; } Store;
static void *taken(Store *s, long bytes) {
    void *p = s->at;
    s->at += (bytes + 63) & -64L;
    return p;
}

static long forward_bytes(long tiles, long width) {
    long tile = SIDE * width;
    return tiles * tile * 4 + tile * 2 + tile * 4 + SIDE * SIDE * 6 + 1024;
}

static void NAME(forward_task)(const Causal *c, long start, long length, int group, char *buffer) {
    long width = c->head_dim, tiles = tiles_of(length), tile = SIDE * width, per = c->heads / c->kv_heads;
    Store s = {buffer};
    uint16_t *k = taken(&s, tiles * tile * 2), *v = taken(&s, tiles * tile * 2);
    uint32_t *q = taken(&s, tile * 2), *weights = taken(&s, SIDE * SIDE * 2);
    float *scores = taken(&s, SIDE * SIDE * 4), *sums = taken(&s, tile * 4);
    for (long j = 0; j < tiles; j++) {
        long rows = length - j * SIDE < SIDE ? length - j * SIDE : SIDE, first = start + j * SIDE;
        copy_rows(c->k + first * c->k_stride + group * width, c->k_stride, rows, width, k + j * tile);
        transposed_rows(c->v + first * c->v_stride + group * width, c->v_stride, rows, width, v + j * tile);
    }
    for (int h = group * per; h < (group + 1) * per; h++) NAME(causal_head)(c, start, length, h, k, v, q, scores, sums, weights);
}

static long backward_bytes(long tiles, long width) {
    long tile = SIDE * width;
    return tiles * (tile * (2 * 3 + 4 * 2 + 2 * 4 + 4) + SIDE * 8) + SIDE * SIDE * 14 + 4096;
}

static void NAME(backward_task)(const Causal *c, long start, long length, int group, char *buffer) {
    long width = c->head_dim, tiles = tiles_of(length), tile = SIDE * width, per = c->heads / c->kv_heads;
    long stride = c->heads * width;
    const float *steps = mask_steps + SIDE;
    Store s = {buffer};
    uint16_t *k = taken(&s, tiles * tile * 2), *kt = taken(&s, tiles * tile * 2), *v = taken(&s, tiles * tile * 2);
    float *dk = taken(&s, tiles * tile * 4), *dv = taken(&s, tiles * tile * 4), *dq = taken(&s, tiles * tile * 4);
    uint32_t *qb = taken(&s, tiles * tile * 2), *qp = taken(&s, tiles * tile * 2);
    uint32_t *ob = taken(&s, tiles * tile * 2), *op = taken(&s, tiles * tile * 2);
    float *lse = taken(&s, tiles * SIDE * 4), *delta = taken(&s, tiles * SIDE * 4);
    float *scores = taken(&s, SIDE * SIDE * 4), *down = taken(&s, SIDE * SIDE * 4);
    uint16_t *p = taken(&s, SIDE * SIDE * 2), *ds = taken(&s, SIDE * SIDE * 2);
    uint32_t *pairs = taken(&s, SIDE * SIDE * 2);
    v16f scale = vset(1.0f / __builtin_sqrtf((float)width));
    for (long j = 0; j < tiles; j++) {
        long rows = length - j * SIDE < SIDE ? length - j * SIDE : SIDE, first = start + j * SIDE;
        const uint16_t *key = c->k + first * c->k_stride + group * width;
        copy_rows(key, c->k_stride, rows, width, k + j * tile);
        transposed_rows(key, c->k_stride, rows, width, kt + j * tile);
        copy_rows(c->v + first * c->v_stride + group * width, c->v_stride, rows, width, v + j * tile);
    }
    memset(dk, 0, tiles * tile * 4), memset(dv, 0, tiles * tile * 4);
    for (int h = group * per; h < (group + 1) * per; h++) {
        for (long i = 0; i < tiles; i++) {
            long rows = length - i * SIDE < SIDE ? length - i * SIDE : SIDE, first = start + i * SIDE;
            const uint16_t *query = c->q + first * c->q_stride + h * width;
            const uint16_t *above = c->above + first * stride + h * width, *out = c->out + first * stride + h * width;
            pairs_by_row(query, c->q_stride, rows, width, qb + i * tile / 2);
            pairs_of_rows(query, c->q_stride, rows, width, qp + i * tile / 2);
            pairs_by_row(above, stride, rows, width, ob + i * tile / 2);
            pairs_of_rows(above, stride, rows, width, op + i * tile / 2);
            for (long r = 0; r < SIDE; r++) {
                lse[i * SIDE + r] = r < rows ? c->lse[h * c->tokens + first + r] : 1e30f;  // weights of 0
                v16f sum = vzero();
                for (long d = 0; r < rows && d < width; d += 16)
                    sum = vfma(load_bf16(above + r * stride + d), load_bf16(out + r * stride + d), sum);
                delta[i * SIDE + r] = vsum(sum);
            }
        }
        for (long i = 0; i < tiles; i++) {
            for (long j = 0; j <= i; j++) {
                NAME(tile_product)((uint32_t *)(k + j * tile), qb + i * tile / 2, scores, SIDE, SIDE, width / 2, 0);
                NAME(tile_product)((uint32_t *)(v + j * tile), ob + i * tile / 2, down, SIDE, SIDE, width / 2, 0);
                for (int r = 0; r < SIDE; r += 2)
                    for (int n = 0; n < 4; n++) {
                        v16f both[2], less = vload(lse + i * SIDE + 16 * n), mean = vload(delta + i * SIDE + 16 * n);
                        for (int t = 0; t < 2; t++) {
                            long at = (r + t) * SIDE + 16 * n;
                            v16f x = vsub(vmul(vload(scores + at), scale), less);
                            if (i == j) x = vadd(x, vload(steps + 16 * n - (r + t)));
                            x = vexp(x);
                            both[t] = vmul(vmul(x, vsub(vload(down + at), mean)), scale);
                            store_bf16(p + at, x), store_bf16(ds + at, both[t]);
                        }
                        store_pairs(pairs + r / 2 * SIDE + 16 * n, both[0], both[1]);
                    }
                NAME(tile_product)((uint32_t *)p, op + i * tile / 2, dv + j * tile, SIDE, width, SIDE / 2, 1);
                NAME(tile_product)((uint32_t *)ds, qp + i * tile / 2, dk + j * tile, SIDE, width, SIDE / 2, 1);
                NAME(tile_product)((uint32_t *)(kt + j * tile), pairs, dq + i * tile, width, SIDE, SIDE / 2, j > 0);
            }
            long rows = length - i * SIDE < SIDE ? length - i * SIDE : SIDE, first = start + i * SIDE;
            NAME(store_transposed)(dq + i * tile, rows, width, c->q_out + first * stride + h * width, stride);
        }
    }
    long wide = c->kv_heads * width;
    NAME(store_rows)(dk, length, width, c->k_out + start * wide + group * width, wide);
    NAME(store_rows)(dv, length, width, c->v_out + start * wide + group * width, wide);
}

// out, lse (above null) or the gradients by q, k, v: a task for each segment and key head.
void NAME(causal)(Causal *c) {
    long longest = 0;
    for (long s = 0; s < c->segments; s++) longest = c->lengths[s] > longest ? c->lengths[s] : longest;
    long tiles = tiles_of(longest), bytes = c->above ? backward_bytes(tiles, c->head_dim) : forward_bytes(tiles, c->head_dim);
#pragma omp parallel num_threads(c->threads)
    {
        char *buffer = aligned_alloc(64, (bytes + 63) & -64L);
        if (!buffer) c->failed = 1;
#pragma omp for schedule(dynamic)
        for (long t = 0; t < c->segments * c->kv_heads; t++) {
            long s = t / c->kv_heads;
            if (!buffer || !c->lengths[s]) continue;
            if (c->above) NAME(backward_task)(c, c->starts[s], c->lengths[s], (int)(t % c->kv_heads), buffer);
            else NAME(forward_task)(c, c->starts[s], c->lengths[s], (int)(t % c->kv_heads), buffer);
        }
        free(buffer);
    }
}
