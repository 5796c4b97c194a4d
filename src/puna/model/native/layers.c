// Whole layers in one call: what Block.forward (decoder.py) does with packed weights, step by step the same functions and
// roundings, without the price of a dozen calls from Python for each layer.

typedef struct {
    const Weight *qkv, *out, *gate_up, *down;  // heads, then keys, then values; gate above up
    const void *before, *after;                // norm weights, of attention and of the feed-forward
    char *pool;                                // the layer's records
    Attention *attention;                      // of its group of layers
    long hidden;                               // feed-forward width
    int rotates, scales, adjacent;             // queries and keys are rotated, in pairs side by side; queries are scaled
    float norm_eps;                            // of queries and keys after the rotation; negative: no norm
    float eps;                                 // of the other norms
    Mixture *mixture;                          // in place of gate_up and down
} Layer;

typedef struct {  // one pass over `rows` tokens
    Layer *layers;
    long count, rows, width;                   // layers; tokens; model width
    void *x;                                   // [rows][width] the stream, in and out
    void *normed, *qkv, *heads, *gate_up, *inner, *added;  // [rows] times width, q + k + v, q, 2 hidden, hidden, width:
                                                           // of the widest layer
    char *scratch;                             // of the largest product
    const float *cosines, *sines, *scale;
    const int64_t *wanted;                     // [kept] rows that anybody reads after the last layer, ascending
    long kept;                                 // negative: all are read
    int bf16, threads, failed;
} Pass;

// x += y, rows of `width`.
static void NAME(add)(char *x, const char *y, long rows, long width, int bf16, int threads) {
    long size = width * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        if (bf16) add_row(x + r * size, y + r * size, width, 1);
        else add_row(x + r * size, y + r * size, width, 0);
    }
}

// The last layer from attention on, for the wanted rows only: of the others nobody reads more than keys and values. Their
// queries and their stream move to the front. Attention of consecutive ones is one span's.
static void NAME(attend_wanted)(Pass *p, Attention *all, long stream, long queries, long stride) {
    Attention a = *all;
    int64_t *starts = malloc((p->kept + 1) * 2 * sizeof(int64_t)), *counts = starts + p->kept + 1;
    const int32_t **tables = malloc((p->kept + 1) * sizeof(*tables));
    p->failed = !starts || !tables;
    NAME(keep)(all);
    a.spans = 0, a.k = 0, a.starts = starts, a.counts = counts, a.tables = tables;
    for (long i = 0, s = 0, row = 0; !p->failed && i < p->kept; i++) {
        long at = p->wanted[i];
        memmove((char *)p->x + i * stream, (char *)p->x + at * stream, stream);
        memmove((char *)p->qkv + i * stride, (char *)p->qkv + at * stride, queries);
        int goes_on = i > 0 && at == p->wanted[i - 1] + 1 && at < row + all->counts[s];
        while (at >= row + all->counts[s]) row += all->counts[s++];
        if (goes_on) counts[a.spans - 1]++;
        else starts[a.spans] = all->starts[s] + at - row, counts[a.spans] = 1, tables[a.spans++] = all->tables[s];
    }
    if (a.spans && !p->failed) {
        NAME(attend)(&a);
        p->failed = a.failed;
    }
    free(starts), free(tables);
}

void NAME(layers)(Pass *p) {
    long size = p->bf16 ? 2 : 4, rows = p->rows;
    p->failed = 0;
    for (long i = 0; i < p->count && !p->failed; i++) {
        const Layer *l = p->layers + i;
        Attention *a = l->attention;
        long q = (long)a->heads * a->head_dim, kv = (long)a->kv_heads * a->head_dim, all = l->qkv->outputs;
        char *keys = (char *)p->qkv + q * size;
        NAME(rms_norm)(p->x, l->before, p->normed, p->rows, p->width, l->eps, p->bf16, p->threads);
        NAME(linear)(l->qkv, p->normed, p->qkv, p->rows, p->width, p->bf16, p->scratch, p->threads);
        if (l->rotates || l->scales) {
            Turn turn = {p->qkv, keys, l->rotates ? p->cosines : 0, p->sines, l->scales ? p->scale : 0, p->rows, all,
                         all, a->heads, a->kv_heads, a->head_dim, p->bf16, l->adjacent, l->norm_eps, p->threads};
            NAME(turn)(&turn);
        }
        a->pool = l->pool, a->q = p->qkv, a->k = keys, a->v = keys + kv * size, a->out = p->heads;
        a->q_stride = a->k_stride = a->v_stride = all;
        if (p->kept >= 0 && i == p->count - 1) {
            NAME(attend_wanted)(p, a, p->width * size, q * size, all * size);
            if (!(rows = p->kept)) break;
        } else {
            NAME(attend)(a);
            p->failed = a->failed;
        }
        NAME(linear)(l->out, p->heads, p->added, rows, q, p->bf16, p->scratch, p->threads);
        NAME(add)(p->x, p->added, rows, p->width, p->bf16, p->threads);
        NAME(rms_norm)(p->x, l->after, p->normed, rows, p->width, l->eps, p->bf16, p->threads);
        if (l->mixture) {
            NAME(mixture)(l->mixture, p->normed, p->added, rows, p->width, p->bf16, p->threads);
            p->failed |= l->mixture->failed;
        } else {
            NAME(linear)(l->gate_up, p->normed, p->gate_up, rows, p->width, p->bf16, p->scratch, p->threads);
            NAME(silu_mul)(p->gate_up, p->inner, rows, l->hidden, p->bf16, p->threads);
            NAME(linear)(l->down, p->inner, p->added, rows, l->hidden, p->bf16, p->scratch, p->threads);
        }
        NAME(add)(p->x, p->added, rows, p->width, p->bf16, p->threads);
    }
}
