// out[m, n] = sum over k of x[m, k] * weight[n, k], for weights in panels of sixteen outputs.
//
// A lane is one output; k runs upward in it from first to last, whatever the number of rows, threads or panels worked on
// together. So a row's result is the same bits alone and in any batch.
//
// Panel layouts (P = ceil(N / 16) panels; K padded with zeros to whole steps and groups):
//   FLOAT32  [P][K][16] float           BFLOAT16 [P][K/2][16][2] bfloat16
//   INT8     [P][K/4][16][4] uint8, value + 128
//   INT4     [P][K/8][16][4] uint8, low nibble k..k+3, high nibble k+4..k+7, value + 8
//   FLOAT8   [P][K][16] e4m3
//   INT6     [P][K/16][3][16][4] uint8, value + 32: low nibbles of k..k+7 as above, those of k+8..k+15, and the two high
//            bits of all, those of k..k+3 lowest
// Scales are [P][K/group][16]. Integer kinds with `exact` 0 take activations as int8, one scale a row and span, a span
// being some groups: sums within a group are integers, hence exact. With `exact` 1, and for FLOAT8, a panel is widened to
// float32 a piece at a time and activations are float32.

enum { FLOAT32, BFLOAT16, INT8, INT4, FLOAT8, INT6 };
enum { SCALE_FLOAT32, SCALE_FLOAT16, SCALE_BFLOAT16 };

typedef struct {
    int kind, exact, scale_kind, group;
    long outputs, inputs;  // N; K as padded
    const char *panels, *scales;
} Weight;

typedef struct {  // rows ready for a kind: int8 with a scale a span and what a group's sum begins with, or float32, or bfloat16
    const char *values;
    const float *scales;
    const int32_t *begins;
} Rows;

enum { AHEAD = 4096 };  // bytes that a single row's loads are fetched ahead
enum { SPAN = 128 };    // inputs of a row that share a scale, at most, unless a group of weights is larger
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)

// Inputs of a row that share a scale: as many whole groups as fit into SPAN and divide the row.
static long span_of(const Weight *w) {
    for (long span = SPAN / w->group * w->group; span > w->group; span -= w->group)
        if (w->inputs % span == 0) return span;
    return w->group;
}

INLINE v16f load_scales(const char *scales, int kind, long at) {
    if (kind == SCALE_FLOAT16) return load_f16((const uint16_t *)scales + at * 16);
    if (kind == SCALE_BFLOAT16) return load_bf16((const uint16_t *)scales + at * 16);
    return vload((const float *)scales + at * 16);
}

INLINE void store_panel(void *out, long n, long outputs, v16f x, int bf16) {
    if (n + 16 <= outputs) store_any(out, n, x, bf16);
    else store_tail(out, n, outputs, x, bf16);
}

// MR rows by NR panels, every accumulator in a register meanwhile. The sums are left in `acc` [MR][NR][16], and taken up
// from there unless this is the `first` piece of k.
#define FLOAT_TILE(MR, NR)                                                                                            \
    static void NAME(float_##MR##x##NR)(const float *x, long x_stride, const float *w, long w_stride, long count,     \
                                        float *acc, int first) {                                                      \
        v16f sum[MR][NR];                                                                                             \
        EACH(m, MR)                                                                                                   \
            EACH(n, NR) sum[m][n] = first ? vzero() : vload(acc + (m * NR + n) * 16);                                 \
        for (long k = 0; k < count; k++) {                                                                            \
            v16f b[NR];                                                                                               \
            EACH(n, NR) b[n] = vload(w + n * w_stride + k * 16);                                                      \
            EACH(m, MR) {                                                                                             \
                v16f a = vset(x[m * x_stride + k]);                                                                   \
                EACH(n, NR) sum[m][n] = vfma(a, b[n], sum[m][n]);                                                     \
            }                                                                                                         \
        }                                                                                                             \
        EACH(m, MR)                                                                                                   \
            EACH(n, NR) vstore(acc + (m * NR + n) * 16, sum[m][n]);                                                   \
    }

#define BF16_TILE(MR, NR)                                                                                             \
    static void NAME(bf16_##MR##x##NR)(const uint16_t *x, long x_stride, const uint16_t *w, long w_stride, long count,\
                                       float *acc, int first) {                                                       \
        v16f sum[MR][NR];                                                                                             \
        EACH(m, MR)                                                                                                   \
            EACH(n, NR) sum[m][n] = first ? vzero() : vload(acc + (m * NR + n) * 16);                                 \
        for (long k = 0; k < count; k += 2) {                                                                         \
            v16i b[NR];                                                                                               \
            EACH(n, NR) b[n] = iload(w + n * w_stride + k * 16);                                                      \
            if (NR == 2) EACH(n, NR) prefetch_far(w + (NR + n) * w_stride + k * 16);                                   \
            EACH(m, MR) {                                                                                             \
                v16i a = ibroadcast(x + m * x_stride + k);                                                            \
                EACH(n, NR) sum[m][n] = dot2(sum[m][n], a, b[n]);                                                     \
            }                                                                                                         \
        }                                                                                                             \
        EACH(m, MR)                                                                                                   \
            EACH(n, NR) vstore(acc + (m * NR + n) * 16, sum[m][n]);                                                   \
    }

// The next inputs of a panel as bytes from zero up, four a lane: how many fours each width gives at once.
enum { FOURS4 = 2, FOURS8 = 2, FOURS6 = 4 };
INLINE void fours_8(const char *at, v16i *x) { x[0] = iload(at), x[1] = iload(at + 64); }
INLINE void fours_4(const char *at, v16i *x) { x[0] = low_nibbles(iload(at)), x[1] = high_nibbles(iload(at)); }
INLINE void fours_6(const char *at, v16i *x) {
    fours_4(at, x), fours_4(at + 64, x + 2);
    v16i high = iload(at + 128);
    x[0] = with_bits45(x[0], ileft(high, 4)), x[1] = with_bits45(x[1], ileft(high, 2));
    x[2] = with_bits45(x[2], high), x[3] = with_bits45(x[3], iright(high, 2));
}

static int zero_of(const Weight *w) { return w->kind == INT4 ? 8 : w->kind == INT6 ? 32 : 128; }

// One group of k after another: integers within a group, exact in any order, times the weights' scale into a span's
// float32 sum, and that times the activations' scale into the total. A single row is bound by memory: it reads panel after
// panel as one stream, fetched ahead past the caches that later rows would want. Several rows work on one group of panels
// while the next one is fetched.
#define INT_TILE(MR, NR, BITS)                                                                                        \
    static void NAME(int##BITS##_##MR##x##NR)(const Weight *w, const Rows *x, long row, long panel, float *acc) {     \
        long groups = w->inputs / w->group, panel_bytes = w->inputs * 2 * BITS, span = span_of(w);                    \
        const int8_t *values = (const int8_t *)x->values + row * w->inputs;                                           \
        const char *weights = w->panels + panel * panel_bytes;                                                        \
        v16f total[MR][NR];                                                                                           \
        EACH(m, MR) EACH(n, NR) total[m][n] = vzero();                                                                \
        for (long s = 0, g = 0; s < w->inputs / span; s++) {                                                          \
            v16f part[MR][NR];                                                                                        \
            EACH(m, MR) EACH(n, NR) part[m][n] = vzero();                                                             \
            for (; g * w->group < (s + 1) * span; g++) {                                                              \
                v16i sum[MR][NR], other = iset(0);                                                                    \
                EACH(m, MR) {                                                                                         \
                    v16i begin = ibroadcast(x->begins + (row + m) * groups + g);                                      \
                    EACH(n, NR) sum[m][n] = begin;                                                                    \
                }                                                                                                     \
                for (long k = g * w->group; k < (g + 1) * w->group; k += 4 * FOURS##BITS) {                           \
                    v16i weight[NR][FOURS##BITS];                                                                     \
                    EACH(n, NR) {                                                                                     \
                        const char *at = weights + n * panel_bytes + k * 2 * BITS;                                    \
                        EACH(line, FOURS##BITS * BITS / 8) {                                                          \
                            if (MR == 1) prefetch_once(at + 64 * line + AHEAD);                                       \
                            else prefetch_far(at + 64 * line + NR * panel_bytes);                                     \
                        }                                                                                             \
                        fours_##BITS(at, weight[n]);                                                                  \
                    }                                                                                                 \
                    EACH(m, MR) EACH(i, FOURS##BITS) {                                                                \
                        v16i a = ibroadcast(values + m * w->inputs + k + 4 * i);                                      \
                        if (MR * NR == 1 && i % 2) other = dot4(other, weight[0][i], a);                              \
                        else EACH(n, NR) sum[m][n] = dot4(sum[m][n], weight[n][i], a);                                \
                    }                                                                                                 \
                }                                                                                                     \
                if (MR * NR == 1) sum[0][0] = iadd(sum[0][0], other);                                                 \
                EACH(n, NR) {                                                                                         \
                    v16f scale = load_scales(w->scales, w->scale_kind, (panel + n) * groups + g);                     \
                    if (MR == 1) prefetch_once(w->scales + ((panel + n) * groups + g) * 32 + 1024);                   \
                    EACH(m, MR) part[m][n] = vfma(to_float(sum[m][n]), scale, part[m][n]);                            \
                }                                                                                                     \
            }                                                                                                         \
            EACH(m, MR) {                                                                                             \
                v16f scale = vset(x->scales[(row + m) * (w->inputs / span) + s]);                                     \
                EACH(n, NR) total[m][n] = vfma(part[m][n], scale, total[m][n]);                                       \
            }                                                                                                         \
        }                                                                                                             \
        EACH(m, MR) EACH(n, NR) vstore(acc + (m * NR + n) * 16, total[m][n]);                                         \
    }

// Few rows: many panels at once keep the arithmetic units busy; many rows: two panels serve as many as registers hold.
#define TILES(T, ...)                                                                                                 \
    T(1, 8, ##__VA_ARGS__) T(1, 4, ##__VA_ARGS__) T(2, 4, ##__VA_ARGS__) T(4, 4, ##__VA_ARGS__)                       \
    T(1, 2, ##__VA_ARGS__) T(2, 2, ##__VA_ARGS__) T(4, 2, ##__VA_ARGS__) T(6, 2, ##__VA_ARGS__) T(10, 2, ##__VA_ARGS__)                      \
    T(1, 1, ##__VA_ARGS__) T(2, 1, ##__VA_ARGS__) T(4, 1, ##__VA_ARGS__) T(6, 1, ##__VA_ARGS__) T(10, 1, ##__VA_ARGS__)
TILES(FLOAT_TILE)
TILES(BF16_TILE)
TILES(INT_TILE, 8)
TILES(INT_TILE, 4)
TILES(INT_TILE, 6)

#define CASE(MR, NR, CALL)                                                                                            \
    case MR * 16 + NR: NAME(CALL##_##MR##x##NR) ARGS; break;
#define RUN(CALL, mr, nr)                                                                                             \
    switch ((mr) * 16 + (nr)) { TILES(CASE, CALL) }

static int tile_rows(long left, int nr, int most) {
    if (nr == 8) return 1;
    if (nr < 4 && left >= most) return most;
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

INLINE v16f widen_e4m3(const uint8_t *p) {  // sign, four bits of exponent (bias 7), three of fraction; no infinities
    uint32_t lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = (uint32_t)(p[i] & 0x80) << 24 | (uint32_t)(p[i] & 0x7f) << 20;
    float floats[16];
    memcpy(floats, lanes, 64);
    return vmul(vload(floats), vset(0x1p120f));  // from bias 7 to 127; denormals come out right, too
}

// `count` inputs from k of one panel as float32 [count][16].
static void NAME(widen)(const Weight *w, long panel, long k, long count, float *out) {
    long groups = w->inputs / w->group;
    for (long i = 0; i < count; i += 8) {
        v16f scale = load_scales(w->scales, w->scale_kind, panel * groups + (k + i) / w->group);
        if (w->kind == FLOAT8) {
            const uint8_t *p = (const uint8_t *)w->panels + (panel * w->inputs + k + i) * 16;
            for (int j = 0; j < 8; j++) vstore(out + (i + j) * 16, vmul(widen_e4m3(p + j * 16), scale));
            continue;
        }
        v16f shift = vset((float)zero_of(w));
        v16i fours[4];
        long in = (k + i) % 16;  // six bits come in sixteens, of which this is one half or the other
        if (w->kind == INT8) fours_8(w->panels + (panel * w->inputs + k + i) * 16, fours);
        else if (w->kind == INT4) fours_4(w->panels + (panel * w->inputs + k + i) * 8, fours);
        else fours_6(w->panels + (panel * w->inputs + k + i - in) * 12, fours);
        v16i first = fours[in && w->kind == INT6 ? 2 : 0], second = fours[in && w->kind == INT6 ? 3 : 1];
        EACH(j, 4) {
            v16i low = bits_from(first, 8 * j, 255), high = bits_from(second, 8 * j, 255);
            vstore(out + (i + j) * 16, vmul(vsub(to_float(low), shift), scale));
            vstore(out + (i + j + 4) * 16, vmul(vsub(to_float(high), shift), scale));
        }
    }
}

enum { PIECE = 128, MOST_ROWS = 480 };  // widened inputs at once (two panels: 16 KB); rows whose sums stay in cache

static void NAME(panel_group)(const Weight *w, const Rows *x, long rows, long panel, int nr, float *acc) {
    if (w->kind == FLOAT32 || w->kind == BFLOAT16 || w->exact) {
        float wide[2 * 16 * PIECE];
        int widened = w->kind != FLOAT32 && w->kind != BFLOAT16;
        long piece = widened ? PIECE / (nr > 2 ? nr / 2 : 1) : w->inputs;
        for (long k = 0; k < w->inputs; k += piece) {
            long count = k + piece < w->inputs ? piece : w->inputs - k;
            for (int n = 0; widened && n < nr; n++) NAME(widen)(w, panel + n, k, count, wide + n * piece * 16);
            const float *weights = widened ? wide : (const float *)w->panels + (panel * w->inputs + k) * 16;
            long stride = widened ? piece * 16 : w->inputs * 16;
            for (long row = 0; row < rows;) {
                int mr = tile_rows(rows - row, nr, 10);
                float *at = acc + row * nr * 16;
                if (w->kind == BFLOAT16) {
                    const uint16_t *half = (const uint16_t *)w->panels + panel * w->inputs * 16;
#define ARGS ((const uint16_t *)x->values + row * w->inputs, w->inputs, half, stride, count, at, 1)
                    RUN(bf16, mr, nr)
#undef ARGS
                } else {
#define ARGS ((const float *)x->values + row * w->inputs + k, w->inputs, weights, stride, count, at, k == 0)
                    RUN(float, mr, nr)
#undef ARGS
                }
                row += mr;
            }
        }
        return;
    }
    for (long row = 0; row < rows;) {
        int mr = tile_rows(rows - row, nr, 6);
        float *at = acc + row * nr * 16;
#define ARGS (w, x, row, panel, at)
        if (w->kind == INT4) RUN(int4, mr, nr)
        else if (w->kind == INT6) RUN(int6, mr, nr)
        else RUN(int8, mr, nr)
#undef ARGS
        row += mr;
    }
}

// One row to int8, a scale a span: the largest magnitude becomes 127. The weights are stored from zero up, so a group's sum
// begins with what their zero contributes.
static void quantize_row(const void *x, int bf16, long width, const Weight *w, int8_t *values, float *scales, int32_t *begins) {
    long span = span_of(w);
    for (long s = 0; s < w->inputs / span; s++) {
        v16f most = vzero();
        for (long k = s * span; k < (s + 1) * span; k += 16) {
            if (k >= width) break;
            most = vmax(most, vabs(k + 16 <= width ? load_any(x, k, bf16) : load_tail(x, k, width, bf16)));
        }
        float largest = vmaximum(most), inverse = largest > 0 ? 127.0f / largest : 0;
        scales[s] = largest / 127.0f;
        for (long g = s * span; g < (s + 1) * span; g += w->group) {
            v16i sum = iset(0);
            for (long k = g; k < g + w->group; k += 16) {
                v16f v = k + 16 <= width ? load_any(x, k, bf16) : k < width ? load_tail(x, k, width, bf16) : vzero();
                v16i rounded = to_int(vmul(v, vset(inverse)));
                store_i8(values + k, rounded);
                sum = iadd(sum, rounded);
            }
            begins[g / w->group] = -zero_of(w) * isum(sum);
        }
    }
}

// Rows [rows, width] of the stream's dtype in the form that the weight's kind takes, in `scratch` where they must change.
static Rows prepare(const Weight *w, const char *x, int bf16, long rows, long width, char *scratch, int threads) {
    Rows ready = {x, NULL, NULL};
    long groups = w->inputs / w->group, spans = w->inputs / span_of(w), size = bf16 ? 2 : 4;
    if (!w->exact && w->kind != FLOAT32 && w->kind != BFLOAT16) {
        float *scales = (float *)scratch;
        int32_t *begins = (int32_t *)(scales + rows * spans);
        int8_t *values = (int8_t *)(begins + rows * groups);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
        for (long r = 0; r < rows; r++)
            quantize_row(x + r * width * size, bf16, width, w, values + r * w->inputs, scales + r * spans, begins + r * groups);
        return (Rows){(char *)values, scales, begins};
    }
    int wanted = w->kind == BFLOAT16 ? 2 : 4;
    if (wanted == size && width == w->inputs) return ready;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
    for (long r = 0; r < rows; r++) {
        char *row = scratch + r * w->inputs * wanted;
        if (wanted == size) memcpy(row, x + r * width * size, width * size);
        else
            for (long k = 0; k < width; k += 16) {  // between float32 and bfloat16
                long end = k + 16 < width ? k + 16 : width;
                store_tail(row, k, end, load_tail(x + r * width * size, k, end, bf16), !bf16);
            }
        memset(row + width * wanted, 0, (w->inputs - width) * wanted);
    }
    ready.values = scratch;
    return ready;
}

// out [rows, outputs] = x [rows, width] @ weight.T, both in float32 or (`bf16`) bfloat16, float32 inside.
// scratch: rows * (inputs * 4 + inputs / group * 8) bytes.
void NAME(linear)(const Weight *w, const void *x, void *out, long rows, long width, int bf16, char *scratch, int threads) {
    Rows ready = prepare(w, x, bf16, rows, width, scratch, threads);
    long panels = (w->outputs + 15) / 16, groups = w->inputs / w->group, spans = w->inputs / span_of(w);
    int value_size = w->kind == BFLOAT16 ? 2 : w->exact || w->kind == FLOAT32 ? 4 : 1, size = bf16 ? 2 : 4;
    int integers = w->kind >= INT8 && !w->exact, wide = rows == 1 && integers ? 1 : rows < 10 ? 4 : 2;
    long work = rows * w->outputs * w->inputs, some = panels / (8 * threads) / wide * wide, step = some > wide ? some : wide;
    long steps = (panels + step - 1) / step;
#pragma omp parallel num_threads(threads) if (work > 100000)
    {
        float acc[MOST_ROWS * 2 * 16];
        for (long block = 0; block < rows; block += MOST_ROWS) {
            long count = rows - block < MOST_ROWS ? rows - block : MOST_ROWS;
            Rows here = {ready.values + block * w->inputs * value_size, ready.scales + block * spans, ready.begins + block * groups};
#pragma omp for schedule(dynamic, 1) nowait
            for (long i = 0; i < steps; i++) {  // a thread that is held up takes fewer of them
                long last = (i + 1) * step < panels ? (i + 1) * step : panels;
                for (long panel = i * step; panel < last;) {
                    int nr = last - panel >= wide ? wide : 1;
                    NAME(panel_group)(w, &here, count, panel, nr, acc);
                    for (long row = 0; row < count; row++)
                        for (int n = 0; n < nr; n++)
                            store_panel((char *)out + (block + row) * w->outputs * size, (panel + n) * 16, w->outputs,
                                        vload(acc + (row * nr + n) * 16), bf16);
                    panel += nr;
                }
            }
        }
    }
}
