// Rows of a weight in panels, as an embedding gives them: values times scales, in float32 or bfloat16.

static void NAME(one_row)(const Weight *w, long id, void *out, long width, int bf16) {
    long panel = id / 16, lane = id % 16;
    float wide[8 * 16], row[16];
    const float *plain = (const float *)w->panels + panel * w->inputs * 16 + lane;
    const uint16_t *half = (const uint16_t *)w->panels + panel * w->inputs * 16 + lane * 2;
    for (long k = 0; k < width; k += 16) {
        for (long i = 0; i < 16; i++) {
            long at = k + i;
            if (at >= w->inputs) row[i] = 0;
            else if (w->kind == FLOAT32) row[i] = plain[at * 16];
            else if (w->kind == BFLOAT16) {
                uint32_t bits = (uint32_t)half[at / 2 * 32 + at % 2] << 16;
                memcpy(row + i, &bits, 4);
            } else {
                if (i % 8 == 0) NAME(widen)(w, panel, at, 8, wide);
                row[i] = wide[i % 8 * 16 + lane];
            }
        }
        store_tail(out, k, k + 16 < width ? k + 16 : width, vload(row), bf16);
    }
}

// out [count, width] = rows `ids` of the weight.
void NAME(rows)(const Weight *w, const int64_t *ids, void *out, long count, long width, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 4)
    for (long i = 0; i < count; i++) NAME(one_row)(w, ids[i], (char *)out + i * size, width, bf16);
}
