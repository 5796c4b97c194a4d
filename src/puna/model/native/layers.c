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

void NAME(layers)(Pass *p) {
    long size = p->bf16 ? 2 : 4;
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
        NAME(attend)(a);
        p->failed = a->failed;
        NAME(linear)(l->out, p->heads, p->added, p->rows, q, p->bf16, p->scratch, p->threads);
        NAME(add)(p->x, p->added, p->rows, p->width, p->bf16, p->threads);
        NAME(rms_norm)(p->x, l->after, p->normed, p->rows, p->width, l->eps, p->bf16, p->threads);
        if (l->mixture) {
            NAME(mixture)(l->mixture, p->normed, p->added, p->rows, p->width, p->bf16, p->threads);
            p->failed |= l->mixture->failed;
        } else {
            NAME(linear)(l->gate_up, p->normed, p->gate_up, p->rows, p->width, p->bf16, p->scratch, p->threads);
            NAME(silu_mul)(p->gate_up, p->inner, p->rows, l->hidden, p->bf16, p->threads);
            NAME(linear)(l->down, p->inner, p->added, p->rows, l->hidden, p->bf16, p->scratch, p->threads);
        }
        NAME(add)(p->x, p->added, p->rows, p->width, p->bf16, p->threads);
    }
}
