// A mixture of experts in one call: what MixtureOfExperts.forward (feedforward.py) does with packed weights, step by step
// the same functions and roundings. Each expert serves its rows together; a row's bits depend on nothing beside it.

typedef struct {
    const Weight *router, *gate_up, *down;   // the last two of the shared expert, gate above up
    const Weight *const *experts;            // [count][2]: gate above up, then down
    long count, choices, hidden;             // experts; how many of them serve a row; feed-forward width
    int64_t *load;                           // [count] rows that each has served, counted on
    int failed;                              // set to 1 where there was no memory
} Mixture;

INLINE float value_at(const void *p, long i, int bf16) {
    if (!bf16) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The row's `choices` largest logits, the first of equals first (a NaN is larger than any number, as PyTorch has it).
static void choose(const void *logits, long count, long choices, int bf16, int *chosen, float *values) {
    for (long c = 0; c < choices; c++) {
        long best = -1;
        float most = 0;
        for (long e = 0; e < count; e++) {
            float x = value_at(logits, e, bf16);
            int taken = 0;
            for (long d = 0; d < c; d++) taken |= chosen[d] == e;
            if (!taken && (best < 0 || x > most || (x != x && most == most))) best = e, most = x;
        }
        chosen[c] = (int)best, values[c] = most;
    }
}

// out = x * scale, out += y: one row, rounded to its dtype.
INLINE void scale_row(const char *x, float scale, char *out, long width, int bf16) {
    v16f factor = rounded(vset(scale), bf16);
    long i = 0;
    for (; i + 16 <= width; i += 16) store_any(out, i, vmul(load_any(x, i, bf16), factor), bf16);
    if (i < width) store_tail(out, i, width, vmul(load_tail(x, i, width, bf16), factor), bf16);
}

INLINE void add_row(char *out, const char *y, long width, int bf16) {
    long i = 0;
    for (; i + 16 <= width; i += 16) store_any(out, i, vadd(load_any(out, i, bf16), load_any(y, i, bf16)), bf16);
    if (i < width) store_tail(out, i, width, vadd(load_tail(out, i, width, bf16), load_tail(y, i, width, bf16)), bf16);
}

static long scratch_bytes(const Weight *w) { return 4 * w->inputs + 8 * (w->inputs / w->group); }

static long larger(long a, long b) { return a > b ? a : b; }

static long lines(long bytes) { return (bytes + 63) / 64 * 64; }

// down(silu(gate(x)) * up(x)) of `rows` rows.
static void NAME(expert)(const Weight *gate_up, const Weight *down, const char *x, char *out, long rows, long width, long hidden,
                         int bf16, char *both, char *inner, char *scratch, int threads) {
    NAME(linear)(gate_up, x, both, rows, width, bf16, scratch, threads);
    NAME(silu_mul)(both, inner, rows, hidden, bf16, threads);
    NAME(linear)(down, inner, out, rows, hidden, bf16, scratch, threads);
}

// out [rows, width] = shared(x) + sum over each row's choices of expert(sigmoid(logit) * x).
void NAME(mixture)(Mixture *m, const char *x, char *out, long rows, long width, int bf16, int threads) {
    long size = bf16 ? 2 : 4, row = width * size, served = rows * m->choices, most = scratch_bytes(m->router);
    most = larger(larger(most, scratch_bytes(m->gate_up)), scratch_bytes(m->down));
    for (long e = 0; e < 2 * m->count; e++) most = larger(most, scratch_bytes(m->experts[e]));
    long bytes[] = {rows * m->count * size, served * 4, served * 4, served * 8, (m->count + 1) * 8, served * row,
                    served * row, rows * 2 * m->hidden * size, rows * m->hidden * size, rows * most}, total = 0;
    char *at[10], *memory;
    for (int i = 0; i < 10; i++) total += lines(bytes[i]);
    m->failed = posix_memalign((void **)&memory, 64, total) != 0;
    if (m->failed) return;
    for (long i = 0, next = 0; i < 10; next += lines(bytes[i++])) at[i] = memory + next;
    char *logits = at[0], *scaled = at[5], *routed = at[6], *both = at[7], *inner = at[8], *scratch = at[9];
    int *chosen = (int *)at[1];
    float *gates = (float *)at[2];
    long *places = (long *)at[3], *ends = (long *)at[4];  // where a choice's row stands; where an expert's rows end

    NAME(linear)(m->router, x, logits, rows, width, bf16, scratch, threads);
    memset(ends, 0, (m->count + 1) * 8);
    for (long r = 0; r < rows; r++)
        choose(logits + r * m->count * size, m->count, m->choices, bf16, chosen + r * m->choices, gates + r * m->choices);
    NAME(sigmoid)(gates, gates, served);
    for (long c = 0; c < served; c++) ends[chosen[c] + 1]++;
    for (long e = 0; e < m->count; e++) m->load[e] += ends[e + 1], ends[e + 1] += ends[e];
    for (long c = 0; c < served; c++) places[c] = ends[chosen[c]]++;  // now ends[e] is the end of e, not its beginning
#pragma omp parallel for num_threads(threads) schedule(static) if (served * width > 32768)
    for (long c = 0; c < served; c++) {
        const char *from = x + c / m->choices * row;
        if (bf16) scale_row(from, gates[c], scaled + places[c] * row, width, 1);
        else scale_row(from, gates[c], scaled + places[c] * row, width, 0);
    }
    NAME(expert)(m->gate_up, m->down, x, out, rows, width, m->hidden, bf16, both, inner, scratch, threads);
    for (long e = 0, first = 0; e < m->count; first = ends[e++])
        if (ends[e] > first)
            NAME(expert)(m->experts[2 * e], m->experts[2 * e + 1], scaled + first * row, routed + first * row,
                         ends[e] - first, width, m->hidden, bf16, both, inner, scratch, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (served * width > 32768)
    for (long r = 0; r < rows; r++) {
        char *sum = routed + places[r * m->choices] * row;
        for (long c = 1; c < m->choices; c++) {
            const char *next = routed + places[r * m->choices + c] * row;
            if (bf16) add_row(sum, next, width, 1);
            else add_row(sum, next, width, 0);
        }
        if (bf16) add_row(out + r * row, sum, width, 1);
        else add_row(out + r * row, sum, width, 0);
    }
    free(memory);
}
