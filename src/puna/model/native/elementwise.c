// The steps between products: each row by itself, so its bits don't depend on how many rows there are.

INLINE void rms_norm_row(const void *x, const void *weight, void *out, long width, float eps, int bf16) {
    v16f squares[4] = {vzero(), vzero(), vzero(), vzero()};
    long i = 0, whole = width & -16L;
    for (; i < whole; i += 16) {
        v16f v = load_any(x, i, bf16);
        squares[i / 16 % 4] = vfma(v, v, squares[i / 16 % 4]);
    }
    if (i < width) {
        v16f v = load_tail(x, i, width, bf16);
        squares[0] = vfma(v, v, squares[0]);
    }
    float mean = vsum(vadd(vadd(squares[0], squares[1]), vadd(squares[2], squares[3]))) / (float)width;
    v16f scale = vset(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i < whole; i += 16)
        store_any(out, i, vmul(rounded(vmul(load_any(x, i, bf16), scale), bf16), load_any(weight, i, bf16)), bf16);
    if (i < width) {
        v16f v = rounded(vmul(load_tail(x, i, width, bf16), scale), bf16);
        store_tail(out, i, width, vmul(v, load_tail(weight, i, width, bf16)), bf16);
    }
}

// out = x / sqrt(mean(x^2) + eps), rounded, times weight. x, out [rows, width]; weight [width].
void NAME(rms_norm)(const void *x, const void *weight, void *out, long rows, long width, float eps, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        if (bf16) rms_norm_row((const char *)x + r * size, weight, (char *)out + r * size, width, eps, 1);
        else rms_norm_row((const char *)x + r * size, weight, (char *)out + r * size, width, eps, 0);
    }
}

INLINE v16f vsigmoid(v16f x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

INLINE v16f silu_times(v16f gate, v16f up, int bf16) {
    return vmul(rounded(vdiv(gate, vadd(vset(1.0f), vexp(vsub(vzero(), gate)))), bf16), up);
}

INLINE void silu_mul_row(const void *gate, const void *up, void *out, long width, int bf16) {
    long i = 0, whole = width & -16L;
    for (; i < whole; i += 16) store_any(out, i, silu_times(load_any(gate, i, bf16), load_any(up, i, bf16), bf16), bf16);
    if (i < width) {
        v16f v = silu_times(load_tail(gate, i, width, bf16), load_tail(up, i, width, bf16), bf16);
        store_tail(out, i, width, v, bf16);
    }
}

// out [rows, width] = silu(x[:, :width]) * x[:, width:], x [rows, 2 width].
void NAME(silu_mul)(const void *x, void *out, long rows, long width, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        const char *row = (const char *)x + 2 * r * size;
        if (bf16) silu_mul_row(row, row + size, (char *)out + r * size, width, 1);
        else silu_mul_row(row, row + size, (char *)out + r * size, width, 0);
    }
}

// out[i] = 1 / (1 + e^-x[i]), float32.
void NAME(sigmoid)(const float *x, float *out, long count) {
    for (long i = 0; i < count; i += 16) {
        long end = i + 16 < count ? i + 16 : count;
        store_tail(out, i, end, vsigmoid(load_tail(x, i, end, 0)), 0);
    }
}
