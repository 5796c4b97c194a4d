// Rotary positions, Llama 4's weightless norm and its query scale, in place. Products and sums are rounded one by one, as
// PyTorch does.

// Cosine and sine of position * frequency, the angle in float32. out [rows][pairs].
void NAME(angles)(const int64_t *positions, long rows, const float *frequencies, long pairs, float *cosines,
                  float *sines, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * pairs > 4096)
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < pairs; j++) {
            float angle = (float)positions[r] * frequencies[j];
            cosines[r * pairs + j] = (float)__builtin_cos((double)angle);
            sines[r * pairs + j] = (float)__builtin_sin((double)angle);
        }
}

typedef struct {
    void *q, *k;                      // [rows][heads or kv_heads][head_dim]
    const float *cosines, *sines;     // [rows][head_dim / 2], or null: no rotation
    const float *scale;               // [rows], of the queries, or null
    long rows, q_stride, k_stride;    // strides: elements from one row to the next
    int heads, kv_heads, head_dim, bf16;
    int adjacent;                     // pairs (2 j, 2 j + 1), else (j, j + head_dim / 2)
    float norm_eps;                   // negative: no norm
    int threads;
} Turn;

INLINE void round_all(float *x, long width, int bf16) {
    for (long d = 0; d < width; d += 16) vstore(x + d, rounded(vload(x + d), bf16));
}

static void NAME(turn_head)(const Turn *t, char *at, long row, const float *scale) {
    float x[WIDEST], y[WIDEST];
    long width = t->head_dim, half = width / 2;
    const float *c = t->cosines + row * half, *s = t->sines + row * half;
    widen(at, x, width, t->bf16);
    float *from = x;
    if (t->cosines) {
        if (t->adjacent)
            for (long j = 0; j < half; j++) {
                y[2 * j] = x[2 * j] * c[j] - x[2 * j + 1] * s[j];
                y[2 * j + 1] = x[2 * j] * s[j] + x[2 * j + 1] * c[j];
            }
        else
            for (long j = 0; j < half; j++) {
                y[j] = x[j] * c[j] - x[j + half] * s[j];
                y[j + half] = x[j + half] * c[j] + x[j] * s[j];
            }
        round_all(from = y, width, t->bf16);
    }
    if (t->norm_eps >= 0) {
        v16f squares = vzero();
        for (long d = width; d % 16; d++) from[d] = 0;
        for (long d = 0; d < width; d += 16) squares = vfma(vload(from + d), vload(from + d), squares);
        float by = 1.0f / __builtin_sqrtf(vsum(squares) / (float)width + t->norm_eps);
        for (long d = 0; d < width; d++) from[d] *= by;
    }
    if (scale)
        for (long d = 0; d < width; d++) from[d] *= scale[row];
    for (long d = 0; d < width; d += 16) {
        if (d + 16 <= width) store_any(at, d, vload(from + d), t->bf16);
        else store_tail(at, d, width, vload(from + d), t->bf16);
    }
}

void NAME(turn)(const Turn *t) {
    long size = t->bf16 ? 2 : 4;
#pragma omp parallel for num_threads(t->threads) schedule(static) if (t->rows * t->heads * t->head_dim > 32768)
    for (long r = 0; r < t->rows; r++) {
        for (long h = 0; h < t->heads; h++)
            NAME(turn_head)(t, (char *)t->q + (r * t->q_stride + h * t->head_dim) * size, r, t->scale);
        if (!t->cosines && t->norm_eps < 0) continue;  // only queries are scaled
        for (long h = 0; h < t->kv_heads; h++)
            NAME(turn_head)(t, (char *)t->k + (r * t->k_stride + h * t->head_dim) * size, r, 0);
    }
}
