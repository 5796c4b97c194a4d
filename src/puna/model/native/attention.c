// Causal attention over a paged cache (see records.c), and the rotation of queries and keys before it (rotary.c).
//
// A query row walks the blocks that it sees from the lowest upward (softmax with a running maximum), starts afresh at
// every SPLIT positions and adds the parts in ascending order. All of it depends on the row's own tokens only: so its
// bits are the same alone, in a tile with others, on any number of threads. Lanes that a row must not see are never
// multiplied, so what a freed block left behind has no effect.
#include "records.c"
#include "rotary.c"

enum { SPLIT = 4096, TILE_ROWS = 32, FEW_ROWS = 8, FEW_QUERIES = 4, Q_STRIDE = WIDEST + 16 };
#if AVX512
enum { ROWS = 4, COLUMNS = 4 };  // of a tile in registers: rows, and groups of sixteen head elements
#else
enum { ROWS = 2, COLUMNS = 2 };
#endif

// Scores of `rows` queries against the 32 keys of a block: each sum runs over the head's elements in order.
// What follows is fetched into the second-level cache: the first has too few requests in flight for the memory's pace.
INLINE void scores(const char *keys, const float *q, float *out, long width, int rows, int kind, const char *next) {
    v16f sum[ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vzero();
    for (long d = 0; d < width; d++) {
        v16f low = load_kv(keys, d * BLOCK, kind), high = load_kv(keys, d * BLOCK + 16, kind);
        for (int line = 0; next && line < BLOCK * size_of(kind); line += 64)
            __builtin_prefetch(next + d * BLOCK * size_of(kind) + line, 0, 2);
        for (int r = 0; r < rows; r++) {
            v16f x = vset(q[r * Q_STRIDE + d]);
            sum[r][0] = vfma(x, low, sum[r][0]), sum[r][1] = vfma(x, high, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) vstore(out + r * BLOCK, sum[r][0]), vstore(out + r * BLOCK + 16, sum[r][1]);
}

// acc = acc * fade + the weighted values of tokens low to high - 1, in order; `columns` groups of sixteen elements.
INLINE void add_values(const char *v, long v_stride, const float *weights, const float *fade, float *acc, long stride,
                       int rows, int columns, int low, int high, int kind, const char *next) {
    v16f sum[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = vmul(vload(acc + r * stride + c * 16), vset(fade[r]));
    for (int t = low; t < high; t++) {
        v16f x[COLUMNS];
        for (int c = 0; c < columns; c++) x[c] = load_kv(v, t * v_stride + c * 16, kind);
        for (int line = 0; next && line < columns * 16 * size_of(kind); line += 64)
            __builtin_prefetch(next + t * v_stride * size_of(kind) + line, 0, 2);
        for (int r = 0; r < rows; r++) {
            v16f w = vset(weights[r * BLOCK + t]);
            for (int c = 0; c < columns; c++) sum[r][c] = vfma(w, x[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) vstore(acc + r * stride + c * 16, sum[r][c]);
}

typedef struct {  // query rows of one key/value head: all heads of its group at consecutive positions
    long rows, group, first;                     // row r is at position first + r / group
    long padded;                                 // head_dim up to a multiple of sixteen
    float *q, *weights, *fade;                   // [rows][Q_STRIDE], [rows][32], [rows]
    float *top, *sum, *acc;                      // of this split: [rows], [rows][16], [rows][padded]
    float *all_top, *all_sum, *all_acc;          // of the splits so far: [rows], [rows], [rows][padded]
    float *keys, *values;                        // a block in float32: [head_dim][32], [32][padded]
} Tile;

INLINE long sees_from(long position, long chunk) { return chunk ? position / chunk * chunk : 0; }

// Scores to weights: what the running maximum makes of earlier sums goes to `fade`.
INLINE void weigh(Tile *t, long r, int low, int high, const float *scales) {
    const float lowest = -__builtin_inff();
    float *w = t->weights + r * BLOCK, top = t->top[r];
    if (scales) vstore(w, vmul(vload(w), vload(scales))), vstore(w + 16, vmul(vload(w + 16), vload(scales + 16)));
    for (int i = 0; i < low; i++) w[i] = lowest;
    for (int i = high; i < BLOCK; i++) w[i] = lowest;
    v16f a = vload(w), b = vload(w + 16);
    float highest = vmaximum(vmax(a, b));
    t->fade[r] = 1;
    if (highest > top) {
        float gap[16];
        vstore(gap, vexp(vset(top - highest)));
        t->fade[r] = gap[0], t->top[r] = highest;
    }
    a = vexp(vsub(a, vset(t->top[r]))), b = vexp(vsub(b, vset(t->top[r])));
    vstore(t->sum + r * 16, vfma(vload(t->sum + r * 16), vset(t->fade[r]), vadd(a, b)));
    if (scales) a = vmul(a, vload(scales + BLOCK)), b = vmul(b, vload(scales + BLOCK + 16));
    vstore(w, a), vstore(w + 16, b);
}

INLINE void all_columns(const char *v, long v_stride, Tile *t, long r, int rows, int low, int high, int kind,
                        const char *next) {
    const float *w = t->weights + r * BLOCK, *fade = t->fade + r;
    float *acc = t->acc + r * t->padded;
    long c = 0, size = size_of(kind);
    for (; c + COLUMNS * 16 <= t->padded; c += COLUMNS * 16)
        add_values(v + c * size, v_stride, w, fade, acc + c, t->padded, rows, COLUMNS, low, high, kind,
                   next ? next + c * size : 0);
    for (; c < t->padded; c += 16)
        add_values(v + c * size, v_stride, w, fade, acc + c, t->padded, rows, 1, low, high, kind, 0);
}

// One block for rows from..to of a tile. `scales`: of an INT8 record. `next`: the record that follows, to be fetched.
INLINE void attend_block(Tile *t, const char *k, const char *v, long v_stride, const float *scales, long position,
                         long chunk, long width, long from, long to, int kind, const char *next) {
    long r = from, value_bytes = BLOCK * width * size_of(kind);
    for (; r + ROWS <= to; r += ROWS)
        scores(k, t->q + r * Q_STRIDE, t->weights + r * BLOCK, width, ROWS, kind, r == from ? next : 0);
    for (; r < to; r++) scores(k, t->q + r * Q_STRIDE, t->weights + r * BLOCK, width, 1, kind, r == from ? next : 0);
    if (next) next += value_bytes;
    for (r = from; r < to;) {
        int rows = r + ROWS <= to ? ROWS : 1, low[ROWS], high[ROWS], alike = 1;
        for (int i = 0; i < rows; i++) {
            long at = t->first + (r + i) / t->group, start = sees_from(at, chunk) - position;
            low[i] = start > 0 ? start : 0;
            high[i] = at - position + 1 < BLOCK ? at - position + 1 : BLOCK;
            weigh(t, r + i, low[i], high[i], scales);
            alike &= low[i] == low[0] && high[i] == high[0];
        }
        if (rows == ROWS && alike) all_columns(v, v_stride, t, r, ROWS, low[0], high[0], kind, r == from ? next : 0);
        else
            for (int i = 0; i < rows; i++)
                all_columns(v, v_stride, t, r + i, 1, low[i], high[i], kind, r + i == from ? next : 0);
        r += rows;
    }
}

INLINE void attend_split(const Attention *a, Tile *t, long span, int head, long split, int kind) {
    long last = t->first + (t->rows - 1) / t->group, width = a->head_dim, value_at = BLOCK * width * size_of(kind);
    long block = sees_from(t->first, a->chunk) / BLOCK, end = last / BLOCK + 1, per = SPLIT / BLOCK;
    block = block > split * per ? block : split * per;
    end = end < (split + 1) * per ? end : (split + 1) * per;
    for (long r = 0; r < t->rows; r++) t->top[r] = -__builtin_inff();
    memset(t->sum, 0, t->rows * 16 * sizeof(float));
    memset(t->acc, 0, t->rows * t->padded * sizeof(float));
    for (; block < end; block++) {
        long position = block * BLOCK, final = position + BLOCK - 1;
        long from = position > t->first ? (position - t->first) * t->group : 0, to = t->rows;
        if (a->chunk) {  // rows of a later chunk don't see this block
            long seen = ((final / a->chunk + 1) * a->chunk - t->first) * t->group;
            to = seen < to ? seen : to;
        }
        const char *k = record(a, span, block, head);
        const float *scales = kind == INT8 ? (const float *)(k + 2 * value_at) : 0;
        if (t->padded == width && t->rows <= FEW_ROWS) {
            const char *next = block + 1 < end ? record(a, span, block + 1, head) : 0;
            attend_block(t, k, k + value_at, width, scales, position, a->chunk, width, from, to, kind, next);
        } else {
            widen(k, t->keys, BLOCK * width, kind);
            for (long i = 0; i < BLOCK; i++)
                widen(k + value_at + i * width * size_of(kind), t->values + i * t->padded, width, kind);
            attend_block(t, (char *)t->keys, (char *)t->values, t->padded, scales, position, a->chunk, width, from, to,
                         FLOAT32, 0);
        }
    }
}

// Adds a split's part of row r (top, sum, acc) to the whole.
INLINE void add_part(float *all_top, float *all_sum, float *all_acc, float top, float sum, const float *acc, long padded) {
    if (top == -__builtin_inff()) return;  // the row sees nothing there
    float highest = top > *all_top ? top : *all_top, fades[16];
    float before[16] = {*all_top - highest, top - highest};
    vstore(fades, vexp(vload(before)));
    *all_sum = *all_sum * fades[0] + sum * fades[1], *all_top = highest;
    for (long d = 0; d < padded; d += 16)
        vstore(all_acc + d, vfma(vload(all_acc + d), vset(fades[0]), vmul(vload(acc + d), vset(fades[1]))));
}

static void NAME(write_out)(const Attention *a, long row, int head, const float *acc, float sum, long padded) {
    long width = a->head_dim, at = (row * a->heads + head) * width;
    char *out = (char *)a->out + at * (a->bf16 ? 2 : 4);
    for (long d = 0; d < padded; d += 16) {
        v16f x = vdiv(vload(acc + d), vset(sum));
        if (d + 16 <= width) store_any(out, d, x, a->bf16);
        else store_tail(out, d, width, x, a->bf16);
    }
}

typedef struct {
    long span, row, first, count, split;  // row: of the first query; split: the one to do, or -1 for all, here
    int head;
    float *part;                          // [heads of the group][padded + 2] where split >= 0
} Item;

static void NAME(attend_item)(const Attention *a, const Item *item, Tile *t) {
    long width = a->head_dim, group = t->group;
    float scale = 1.0f / __builtin_sqrtf((float)width), row[WIDEST];
    t->first = item->first, t->rows = item->count * group;
    for (long r = 0; r < t->rows; r++) {
        long at = (item->row + r / group) * a->q_stride + (item->head * group + r % group) * width;
        widen((const char *)a->q + at * (a->bf16 ? 2 : 4), row, width, a->bf16);
        for (long d = 0; d < width; d++) t->q[r * Q_STRIDE + d] = row[d] * scale;
        t->all_top[r] = -__builtin_inff(), t->all_sum[r] = 0;
    }
    memset(t->all_acc, 0, t->rows * t->padded * sizeof(float));
    long last = (item->first + item->count - 1) / SPLIT, split = sees_from(item->first, a->chunk) / SPLIT;
    if (item->split >= 0) split = last = item->split;
    for (; split <= last; split++) {
        if (a->kind == FLOAT32) attend_split(a, t, item->span, item->head, split, FLOAT32);
        else if (a->kind == BFLOAT16) attend_split(a, t, item->span, item->head, split, BFLOAT16);
        else attend_split(a, t, item->span, item->head, split, INT8);
        for (long r = 0; r < t->rows; r++) {
            float sum = vsum(vload(t->sum + r * 16)), *acc = t->acc + r * t->padded;
            if (item->split < 0)
                add_part(t->all_top + r, t->all_sum + r, t->all_acc + r * t->padded, t->top[r], sum, acc, t->padded);
            else {
                float *part = item->part + r * (t->padded + 2);
                part[0] = t->top[r], part[1] = sum;
                memcpy(part + 2, acc, t->padded * sizeof(float));
            }
        }
    }
    if (item->split < 0)
        for (long r = 0; r < t->rows; r++)
            NAME(write_out)(a, item->row + r / group, item->head * group + r % group, t->all_acc + r * t->padded,
                            t->all_sum[r], t->padded);
}

typedef struct {  // how a span's work is cut
    long row, first_item, items;      // its first query's row; its share of the items
    long first_block, blocks;         // logical blocks that get new tokens
    long low_split, splits;           // splits > 0: an item is one split of all its queries; else a tile of queries
    long first_head;                  // among the (span, head) whose parts are to be added
    float *parts;                     // [kv_heads][splits][rows][padded + 2]
} Cut;

INLINE long rounded_up(long x) { return (x + 15) / 16 * 16; }

static float *NAME(tile_buffers)(Tile *t, long rows, long width) {
    long sizes[] = {rows * Q_STRIDE, rows * BLOCK, rows, rows, rows * 16, rows * t->padded, rows, rows, rows * t->padded,
                    width * BLOCK, BLOCK * t->padded}, total = 0;
    float **buffers[] = {&t->q, &t->weights, &t->fade, &t->top, &t->sum, &t->acc, &t->all_top, &t->all_sum, &t->all_acc,
                         &t->keys, &t->values};
    for (int i = 0; i < 11; i++) total += rounded_up(sizes[i]);
    float *memory = aligned_alloc(64, total * sizeof(float)), *at = memory;
    for (int i = 0; memory && i < 11; at += rounded_up(sizes[i]), i++) *buffers[i] = at;
    return memory;
}

static void NAME(do_item)(const Attention *a, const Cut *cuts, long index, long per_tile, Tile *t) {
    long span = 0;
    while (span + 1 < a->spans && cuts[span + 1].first_item <= index) span++;
    const Cut *cut = cuts + span;
    index -= cut->first_item;
    Item item = {.span = span, .row = cut->row, .first = a->starts[span], .count = a->counts[span], .split = -1};
    if (cut->splits) {
        item.head = index / cut->splits, item.split = cut->low_split + index % cut->splits;
        item.part = cut->parts + index * item.count * t->group * (t->padded + 2);
    } else {  // the longest rows first
        long skip = ((item.count - 1) / per_tile - index / a->kv_heads) * per_tile;
        item.head = index % a->kv_heads, item.row += skip, item.first += skip;
        item.count = item.count - skip < per_tile ? item.count - skip : per_tile;
    }
    NAME(attend_item)(a, &item, t);
}

static void NAME(add_parts)(const Attention *a, const Cut *cut, long span, long head, long group, long padded) {
    long rows = a->counts[span] * group, size = padded + 2;
    for (long r = 0; r < rows; r++) {
        float top = -__builtin_inff(), sum = 0, acc[WIDEST] = {0};
        for (long s = 0; s < cut->splits; s++) {
            const float *part = cut->parts + ((head * cut->splits + s) * rows + r) * size;
            add_part(&top, &sum, acc, part[0], part[1], part + 2, padded);
        }
        NAME(write_out)(a, cut->row + r / group, head * group + r % group, acc, sum, padded);
    }
}

// Writes the new keys and values into the pool.
static void NAME(keep)(const Attention *a) {
    for (long s = 0, row = 0; s < a->spans; row += a->counts[s++]) {
        long first = a->starts[s] / BLOCK, last = (a->starts[s] + a->counts[s] - 1) / BLOCK;
#pragma omp parallel for num_threads(a->threads) schedule(static) if (last - first > 4)
        for (long block = first; block <= last; block++) NAME(write_block)(a, s, row, block);
    }
}

// Writes the new keys and values into the pool (unless `k` is NULL: they are there), then attends.
void NAME(attend)(Attention *a) {
    long width = a->head_dim, padded = rounded_up(width), group = a->heads / a->kv_heads;
    long per_tile = TILE_ROWS / group > 1 ? TILE_ROWS / group : 1, tile_rows = per_tile * group;
    long row = 0, items = 0, blocks = 0, heads = 0, parts = 0;
    int failed = 0;
    double work = 0;
    tile_rows = tile_rows > FEW_QUERIES * group ? tile_rows : FEW_QUERIES * group;
    Cut *cuts = calloc(a->spans, sizeof(Cut));
    a->failed = 1;
    if (!cuts) return;
    for (long s = 0; s < a->spans; s++) {
        long start = a->starts[s], count = a->counts[s], low = sees_from(start, a->chunk) / SPLIT;
        long splits = (start + count - 1) / SPLIT - low + 1, first_block = start / BLOCK;
        if (count > FEW_QUERIES || splits < 2 || a->threads < 2) splits = 0;
        long mine = a->kv_heads * (splits ? splits : (count + per_tile - 1) / per_tile);
        long written = a->k ? (start + count - 1) / BLOCK - first_block + 1 : 0;
        cuts[s] = (Cut){row, items, mine, blocks, written, low, splits, heads, 0};
        row += count, items += mine, blocks += cuts[s].blocks, heads += splits ? a->kv_heads : 0;
        parts += a->kv_heads * splits * count * group * (padded + 2);
        work += (double)count * (start + count - sees_from(start, a->chunk)) * a->heads * width;
    }
    float *memory = parts ? malloc(parts * sizeof(float)) : 0;
    if (parts && !memory) {
        free(cuts);
        return;
    }
    for (long s = 0, at = 0; s < a->spans; s++) {
        cuts[s].parts = memory + at;
        at += a->kv_heads * cuts[s].splits * a->counts[s] * group * (padded + 2);
    }
#pragma omp parallel num_threads(a->threads) if (work > 1e5) reduction(| : failed)
    {
        Tile tile = {.group = group, .padded = padded};
        float *buffers = NAME(tile_buffers)(&tile, tile_rows, width);
        failed = !buffers;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < blocks; i++) {
            long s = 0;
            while (s + 1 < a->spans && cuts[s + 1].first_block <= i) s++;
            NAME(write_block)(a, s, cuts[s].row, a->starts[s] / BLOCK + i - cuts[s].first_block);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (long i = 0; i < items; i++)
            if (buffers) NAME(do_item)(a, cuts, i, per_tile, &tile);
        if (heads) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
            for (long i = 0; i < heads; i++) {
                long s = 0;
                for (long next = 0; next < a->spans; next++)  // the last with parts that starts at or before i
                    if (cuts[next].splits && cuts[next].first_head <= i) s = next;
                NAME(add_parts)(a, cuts + s, s, i - cuts[s].first_head, group, padded);
            }
        }
        free(buffers);
    }
    free(memory), free(cuts);
    a->failed = failed;
}
