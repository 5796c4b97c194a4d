// Weights to symmetric integers, a float16 scale a group (puna.model.quantized.quantize says which scales are tried).

INLINE float stored_scale(float scale) {  // as float16 keeps it, never zero
    float kept = _cvtsh_ss(_cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT));
    return kept == 0 ? 0x1p-24f : kept;
}

INLINE v16f nearest(v16f x, v16f scale, float top) {
    return vmin(vmax(vround(vdiv(x, scale)), vset(-top - 1)), vset(top));
}

static void quantize_group(const float *x, long group, int bits, int8_t *values, uint16_t *scale_out) {
    float top = (float)((1 << (bits - 1)) - 1), largest = 0, most = 0, best = 0, least = 0;
    for (long k = 0; k < group; k++) {
        largest = __builtin_fabsf(x[k]) > largest ? __builtin_fabsf(x[k]) : largest;
        most = x[k] > most ? x[k] : most;
    }
    float full = (most >= largest ? -largest : largest) / 8;  // the extreme becomes -8
    float tried[4] = {bits == 4 ? full : largest / top, largest / top, largest * 0.92f / top, largest * 0.85f / top};
    for (int i = 0; i < (bits == 4 ? 4 : 1); i++) {
        float scale = stored_scale(tried[i]);
        v16f errors = vzero(), s = vset(scale);
        for (long k = 0; bits == 4 && k < group; k += 16) {
            v16f v = vload(x + k), e = vsub(vmul(nearest(v, s, top), s), v);
            errors = vfma(e, e, errors);
        }
        float error = vsum(errors);
        if (i == 0 || error < least) least = error, best = scale;
    }
    for (long k = 0; k < group; k += 16) store_i8(values + k, to_int(nearest(vload(x + k), vset(best), top)));
    *scale_out = _cvtss_sh(best, _MM_FROUND_TO_NEAREST_INT);
}

// x [rows, width] in float32 or bfloat16; values [rows, width], scales [rows, ceil(width / group)]; group a multiple of 16,
// at most 256.
void NAME(quantize)(const void *x, int bf16, long rows, long width, long group, int bits, int8_t *values, uint16_t *scales,
                    int threads) {
    long groups = (width + group - 1) / group, size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < groups; g++) {
            float wide[256] = {0};
            int8_t narrow[256];
            long first = g * group, end = first + group < width ? first + group : width;
            for (long k = first; k < end; k += 16)
                vstore(wide + k - first, load_tail((const char *)x + r * width * size, k, k + 16 < end ? k + 16 : end, bf16));
            quantize_group(wide, group, bits, narrow, scales + r * groups + g);
            memcpy(values + r * width + first, narrow, end - first);
        }
}
