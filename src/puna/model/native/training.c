// What training does between its products: losses, gradients and updates in one pass over memory each, float32 inside.

typedef struct {
    void *logits;            // [rows][width]; with `errors`, replaced by the gradient of scale * loss
    const int64_t *targets;  // [rows], each within the width
    const float *scales;     // [rows], or null: 1
    float *losses;           // [rows]: log(sum(e^logits)) - logits[target]
    long rows, width;
    int bf16, errors, threads;
} CrossEntropy;

INLINE float one_of(const void *p, long i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void cross_entropy_row(const CrossEntropy *c, long r, int bf16) {
    long width = c->width, whole = width & -16L, target = c->targets[r];
    char *x = (char *)c->logits + r * width * (bf16 ? 2 : 4);
    if (target < 0 || target >= width) {  // not in this vocabulary: nothing that could go unnoticed
        c->losses[r] = __builtin_nanf("");
        return;
    }
    v16f most = vset(-__builtin_inff()), sums[2] = {vzero(), vzero()};
    for (long i = 0; i < whole; i += 16) most = vmax(most, load_any(x, i, bf16));
    float largest = vmaximum(most);
    for (long i = whole; i < width; i++) {
        float one = one_of(x, i, bf16);
        if (one > largest) largest = one;
    }
    for (long i = 0; i < whole; i += 16)
        sums[i / 16 % 2] = vadd(sums[i / 16 % 2], vexp(vsub(load_any(x, i, bf16), vset(largest))));
    float sum = vsum(vadd(sums[0], sums[1])), tail[16] = {0};
    if (whole < width) {
        vstore(tail, vexp(vsub(load_tail(x, whole, width, bf16), vset(largest))));
        for (long i = whole; i < width; i++) sum += tail[i - whole];
    }
    float at_target = one_of(x, target, bf16);
    c->losses[r] = __builtin_logf(sum) + (largest - at_target);
    if (!c->errors) return;
    float scale = c->scales ? c->scales[r] : 1.0f, share = __builtin_expf(at_target - largest) / sum;
    v16f by = vset(scale / sum), base = vset(largest);
    for (long i = 0; i < whole; i += 16) store_any(x, i, vmul(vexp(vsub(load_any(x, i, bf16), base)), by), bf16);
    if (whole < width) store_tail(x, whole, width, vmul(vload(tail), by), bf16);
    store_tail(x, target, target + 1, vset((share - 1.0f) * scale), bf16);
}

void NAME(cross_entropy)(const CrossEntropy *c) {
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (long r = 0; r < c->rows; r++) {
        if (c->bf16) cross_entropy_row(c, r, 1);
        else cross_entropy_row(c, r, 0);
    }
}

typedef struct {
    void *weights;         // float32, or bfloat16: the upper halves of masters
    int16_t *lows;         // what rounding took from the masters; null where the weights are float32
    const void *gradients;
    float *first, *second;
    long count;
    float scale;           // of the gradients
    float keep;            // of the masters: 1 - rate * decay
    float step;            // rate / (1 - beta1^t)
    float root;            // 1 / sqrt(1 - beta2^t)
    float beta1, beta2, eps;
    int half_gradients;    // bfloat16
    int threads;
} Adam;

INLINE void adam_block(const Adam *a, long i, long count, int halves, int half_gradients) {
    float tail[3][16] = {{0}};  // a last block goes through copies: masters, first, second
    uint16_t uppers[16] = {0};
    int16_t lowers[16] = {0};
    float *weights = (float *)a->weights + i, *first = a->first + i, *second = a->second + i;
    uint16_t *upper = (uint16_t *)a->weights + i;
    int16_t *lower = a->lows + i;
    v16f g;
    if (count == 16) g = load_any(a->gradients, i, half_gradients);
    else {
        g = load_tail(a->gradients, i, i + count, half_gradients);
        first = memcpy(tail[1], first, count * 4), second = memcpy(tail[2], second, count * 4);
        if (halves) upper = memcpy(uppers, upper, count * 2), lower = memcpy(lowers, lower, count * 2);
        else weights = memcpy(tail[0], weights, count * 4);
    }
    g = vmul(g, vset(a->scale));
    v16f x = halves ? join_halves(upper, lower) : vload(weights), y = vload(first), z = vload(second);
    y = vfma(vset(1.0f - a->beta1), vsub(g, y), y);
    z = vfma(vmul(vset(1.0f - a->beta2), g), g, vmul(z, vset(a->beta2)));
    x = vsub(vmul(x, vset(a->keep)), vdiv(vmul(vset(a->step), y), vfma(vsqrt(z), vset(a->root), vset(a->eps))));
    vstore(first, y), vstore(second, z);
    if (halves) split_halves(x, upper, lower);
    else vstore(weights, x);
    if (count < 16) {
        memcpy(a->first + i, first, count * 4), memcpy(a->second + i, second, count * 4);
        if (halves) memcpy((uint16_t *)a->weights + i, upper, count * 2), memcpy(a->lows + i, lower, count * 2);
        else memcpy((float *)a->weights + i, weights, count * 4);
    }
}

// One update of decoupled weight decay (AdamW), of masters that lie as weights and what their rounding took.
void NAME(adam)(const Adam *a) {
    long blocks = (a->count + 15) / 16;
#pragma omp parallel for num_threads(a->threads) schedule(static) if (a->count > 8192)
    for (long b = 0; b < blocks; b++) {
        long i = b * 16, count = a->count - i < 16 ? a->count - i : 16;
        if (a->lows && a->half_gradients) adam_block(a, i, count, 1, 1);
        else if (a->lows) adam_block(a, i, count, 1, 0);
        else if (a->half_gradients) adam_block(a, i, count, 0, 1);
        else adam_block(a, i, count, 0, 0);
    }
}

INLINE void swiglu_gradient_row(const void *gate, const void *up, const void *above, void *gate_out, void *up_out, long from,
                                long end, int bf16) {
    for (long i = from; i < end; i += 16) {
        long stop = i + 16;
        int whole = stop <= end;
        v16f g = whole ? load_any(gate, i, bf16) : load_tail(gate, i, end, bf16);
        v16f u = whole ? load_any(up, i, bf16) : load_tail(up, i, end, bf16);
        v16f d = whole ? load_any(above, i, bf16) : load_tail(above, i, end, bf16);
        v16f s = vsigmoid(g), one = vset(1.0f);
        v16f to_up = vmul(vmul(g, s), d);
        v16f to_gate = vmul(vmul(vmul(d, u), s), vfma(g, vsub(one, s), one));
        if (whole) store_any(gate_out, i, to_gate, bf16), store_any(up_out, i, to_up, bf16);
        else store_tail(gate_out, i, end, to_gate, bf16), store_tail(up_out, i, end, to_up, bf16);
    }
}

// out = silu(gate) * up, `count` of each.
void NAME(swiglu)(const void *gate, const void *up, void *out, long count, int bf16, int threads) {
    long blocks = (count + 4095) / 4096, size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 8)
    for (long b = 0; b < blocks; b++) {
        long at = b * 4096, length = count - at < 4096 ? count - at : 4096;
        const char *g = (const char *)gate + at * size, *u = (const char *)up + at * size;
        if (bf16) silu_mul_row(g, u, (char *)out + at * size, length, 1);
        else silu_mul_row(g, u, (char *)out + at * size, length, 0);
    }
}

// Gradients of silu(gate) * up by gate and up, times the one from above.
void NAME(swiglu_gradient)(const void *gate, const void *up, const void *above, void *gate_out, void *up_out, long count,
                           int bf16, int threads) {
    long blocks = (count + 4095) / 4096;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 8)
    for (long b = 0; b < blocks; b++) {
        long end = (b + 1) * 4096 < count ? (b + 1) * 4096 : count;
        if (bf16) swiglu_gradient_row(gate, up, above, gate_out, up_out, b * 4096, end, 1);
        else swiglu_gradient_row(gate, up, above, gate_out, up_out, b * 4096, end, 0);
    }
}

typedef struct {
    const void *x, *weight, *above;  // [rows][width], [width], [rows][width]
    void *out;                       // [rows][width]
    float *weight_out;               // [threads][width] sums, zero before; null: not wanted
    long rows, width;
    float eps;
    int bf16, threads;
} NormGradient;

INLINE void norm_gradient_row(const NormGradient *n, long r, float *sums, int bf16) {
    long width = n->width, size = bf16 ? 2 : 4;
    const char *x = (const char *)n->x + r * width * size, *above = (const char *)n->above + r * width * size;
    char *out = (char *)n->out + r * width * size;
    v16f squares = vzero(), along = vzero();
    for (long i = 0; i < width; i += 16) {
        int whole = i + 16 <= width;
        v16f v = whole ? load_any(x, i, bf16) : load_tail(x, i, width, bf16);
        v16f d = whole ? load_any(above, i, bf16) : load_tail(above, i, width, bf16);
        v16f w = whole ? load_any(n->weight, i, bf16) : load_tail(n->weight, i, width, bf16);
        squares = vfma(v, v, squares), along = vfma(vmul(v, d), w, along);
    }
    float scale = 1.0f / __builtin_sqrtf(vsum(squares) / (float)width + n->eps);
    float mean = vsum(along) * scale * scale / (float)width;  // of normal * gradient, times scale
    for (long i = 0; i < width; i += 16) {
        int whole = i + 16 <= width;
        v16f v = whole ? load_any(x, i, bf16) : load_tail(x, i, width, bf16);
        v16f d = whole ? load_any(above, i, bf16) : load_tail(above, i, width, bf16);
        v16f w = whole ? load_any(n->weight, i, bf16) : load_tail(n->weight, i, width, bf16);
        v16f normal = vmul(v, vset(scale));
        v16f to_x = vmul(vset(scale), vsub(vmul(d, w), vmul(v, vset(mean))));
        if (whole) store_any(out, i, to_x, bf16);
        else store_tail(out, i, width, to_x, bf16);
        if (sums) {
            v16f sum = vmul(normal, d);
            if (whole) vstore(sums + i, vadd(vload(sums + i), sum));
            else store_tail(sums, i, width, vadd(load_tail(sums, i, width, 0), sum), 0);
        }
    }
}

// Gradients of weight * x / sqrt(mean(x^2) + eps).
void NAME(norm_gradient)(const NormGradient *n) {
    long each = (n->rows + n->threads - 1) / n->threads;
#pragma omp parallel for num_threads(n->threads) schedule(static)
    for (int t = 0; t < n->threads; t++) {
        float *sums = n->weight_out ? n->weight_out + t * n->width : 0;
        for (long r = t * each; r < (t + 1) * each && r < n->rows; r++) {
            if (n->bf16) norm_gradient_row(n, r, sums, 1);
            else norm_gradient_row(n, r, sums, 0);
        }
    }
}

// The sum of squares, in double over blocks that don't depend on the number of threads.
double NAME(square_sum)(const void *x, long count, int bf16, int threads) {
    double total = 0;
    long blocks = (count + 65535) / 65536;
    double *sums = malloc(blocks * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 1)
    for (long b = 0; b < blocks; b++) {
        long end = (b + 1) * 65536 < count ? (b + 1) * 65536 : count;
        v16f parts[4] = {vzero(), vzero(), vzero(), vzero()};
        for (long i = b * 65536; i < end; i += 16) {
            v16f v = i + 16 <= end ? load_any(x, i, bf16) : load_tail(x, i, end, bf16);
            parts[i / 16 % 4] = vfma(v, v, parts[i / 16 % 4]);
        }
        sums[b] = (double)vsum(vadd(vadd(parts[0], parts[1]), vadd(parts[2], parts[3])));
    }
    for (long b = 0; b < blocks; b++) total += sums[b];
    free(sums);
    return total;
}
