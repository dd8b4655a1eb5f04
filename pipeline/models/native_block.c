/* A decoder's block with its gradient, in float32 on the CPU. Called by native_block.py, which says
   what it computes; decoder.py has it in torch's words.

   A thread takes a few rows from one product to the next while they are in its cache, and waits for
   the others before and after attention only (and where weights are laid out, and their gradients
   summed). No sum depends on the number of threads. */

#include "native_attention.c"
#include "native_product.c"
#include "native_train.c"

#define CHUNK 48 /* rows that a thread takes from one product to the next */

/* A linear layer (outputs, inputs) or a norm (width); bias may be missing, and so may the norm of
   the MLP, which then has the other's. by_: gradients, where they are wanted. */
typedef struct { const float *weight, *bias; float *by_weight, *by_bias; } part;

/* R rows: B sequences of T. together: q, k and v side by side. */
typedef struct {
    int64_t batch, length, width, heads, kv_heads, head_width, mlp_width, hidden_width;
    int64_t activation, parallel, threads;
    double epsilon;
    part norm, qkv, output, mlp_norm, up, down;
    const float *rope;    /* (2, T, d), or missing */
    const int64_t *first; /* (B, T): the first input that each sees */
    const float *x;       /* (R, D) */
    float *normed, *together, *logs, *attended, *middle, *mlp_normed, *hidden, *active;
    float *kept, *mlp_kept; /* (2, R): mean (LayerNorm's) and scale of each row */
    float *y;               /* (R, D) */
    const float *gradient;  /* (R, D): by y */
    float *by_x, *by_middle, *by_attended, *by_together, *by_hidden, *by_mlp_normed;
} block;

typedef void forward_activation(int64_t, int64_t, int64_t, const float *, float *);
typedef void backward_activation(int64_t, int64_t, int64_t, const float *, const float *, float *);
static forward_activation *const ACTIVATIONS[] = {swiglu, gelu, gelu_tanh, quick_gelu};
static backward_activation *const ACTIVATIONS_BACKWARD[] = {swiglu_backward, gelu_backward,
                                                            gelu_tanh_backward, quick_gelu_backward};

/* A product that the rows of a chunk go through: k numbers of each to n. */
typedef struct { matrix b; int64_t n, k; const float *bias; float *strips; } through;

static int64_t aligned(int64_t floats) { return parts(floats, 16) * 16; }

static int64_t strips_room(through by) { return parts(by.n, TILE_WIDTH) * TILE_WIDTH * by.k; }

static int64_t inner(const block *b) { return b->heads * b->head_width; }

static int64_t together_width(const block *b) { return inner(b) + 2 * b->kv_heads * b->head_width; }

/* The four layers, forth (x W^T) or back (x W). */
static void layers_of(const block *b, int back, through *all) {
    const part *layers[4] = {&b->qkv, &b->output, &b->up, &b->down};
    int64_t inputs[4] = {b->width, inner(b), b->width, b->mlp_width};
    int64_t outputs[4] = {together_width(b), b->width, b->hidden_width, b->width};
    for (int i = 0; i < 4; i++) {
        const float *w = layers[i]->weight;
        if (back) all[i] = (through){{w, inputs[i], 1}, inputs[i], outputs[i], NULL, NULL};
        else all[i] = (through){{w, 1, inputs[i]}, outputs[i], inputs[i], layers[i]->bias, NULL};
    }
}

/* Floats of a thread: rows of a product gathered, and on the way back rows by_active, then by_normed;
   or attention, which comes between. */
static int64_t gathered_room(void) { return (BLOCK + TILE_ROWS) * DEPTH; }

static int64_t thread_room(const block *b) {
    int64_t widest = b->mlp_width > b->width ? b->mlp_width : b->width;
    int64_t chunks = gathered_room() + aligned(CHUNK * widest) + aligned(CHUNK * b->width);
    int64_t attention = aligned(attention_room(b->length, b->head_width));
    return chunks > attention ? chunks : attention;
}

static int64_t shared_room(const block *b, int back) {
    through all[4];
    layers_of(b, back, all);
    int64_t floats = 0;
    for (int i = 0; i < 4; i++) floats += strips_room(all[i]);
    return floats;
}

static int64_t chunks_of(const block *b) { return parts(b->batch * b->length, CHUNK); }

int64_t block_chunk(void) { return CHUNK; }

/* Floats that block_forward and block_backward work in. */
int64_t block_room(const block *b, int64_t back) {
    int64_t floats = shared_room(b, back) + b->threads * thread_room(b);
    if (!back) return floats;
    floats += chunks_of(b) * 8 * b->width;
    int64_t rows = b->batch * b->length, widest = inner(b) > b->width ? inner(b) : b->width;
    if (b->mlp_width > widest) widest = b->mlp_width;
    int64_t by_weight = product_room(widest, rows, b->threads);
    return floats > by_weight ? floats : by_weight;
}

/* x (rows, k) to y (rows, n), + added (rows, n). */
static void go_through(const through *by, int64_t rows, const float *x, const float *added, float *y,
                       float *room) {
    for (int64_t first = 0; first < by->k; first += DEPTH) {
        beginning from = {y, by->n, NULL};
        if (first == 0) from = (beginning){added, by->n, by->bias};
        rows_by_strips(rows, by->n, least(DEPTH, by->k - first), (matrix){x + first, by->k, 1},
                       by->strips + first * TILE_WIDTH, by->k * TILE_WIDTH, 0,
                       parts(by->n, TILE_WIDTH), from, y, by->n, room);
    }
}

/* Where the strips of each product stand; the end of them all. */
static float *place_strips(through *all, float *room) {
    for (int i = 0; i < 4; i++) {
        all[i].strips = room;
        room += strips_room(all[i]);
    }
    return room;
}

/* Work that is shared out: every strip of the four. */
static int64_t strips_in(const through *all) {
    int64_t count = 0;
    for (int i = 0; i < 4; i++) count += parts(all[i].n, TILE_WIDTH);
    return count;
}

static void gather_one(const through *all, int64_t p) {
    while (p >= parts(all->n, TILE_WIDTH)) p -= parts((all++)->n, TILE_WIDTH);
    gather_strip(all->k, all->n, p, all->b, all->strips + p * all->k * TILE_WIDTH);
}

static void norm_rows(const block *b, const part *norm, int64_t row, int64_t rows, const float *x,
                      float *kept, float *y) {
    int64_t n = b->width;
    float *scale = kept + b->batch * b->length + row;
    if (norm->bias)
        layer_norm(rows, n, 1, b->epsilon, x + row * n, norm->weight, norm->bias, kept + row, scale,
                   y + row * n);
    else rms_norm(rows, n, 1, b->epsilon, x + row * n, norm->weight, scale, y + row * n);
}

/* gradient and by_x: of these rows; sums (2, 2, D): by weight and by bias in the first. */
static void norm_rows_backward(const block *b, const part *norm, int64_t row, int64_t rows,
                               const float *gradient, const float *x, const float *kept, float *by_x,
                               float *sums) {
    int64_t n = b->width;
    const float *scale = kept + b->batch * b->length + row;
    if (norm->bias)
        layer_norm_backward(rows, n, 1, 1, gradient, x + row * n, norm->weight, kept + row, scale,
                            by_x, sums);
    else rms_norm_backward(rows, n, 1, 1, gradient, x + row * n, norm->weight, scale, by_x, sums);
}

/* Turn q and k of these rows, where they stand. */
static void turn_rows(const block *b, int64_t row, int64_t rows, float *together, float direction) {
    int64_t d = b->head_width, width = together_width(b);
    for (int64_t r = row; r < row + rows; r++) {
        const float *cos = b->rope + r % b->length * d, *sin = cos + b->length * d;
        for (int64_t h = 0; h < b->heads + b->kv_heads; h++) {
            float *x = together + r * width + h * d;
            turn(x, x, cos, sin, d / 2, direction);
        }
    }
}

static void add_rows(int64_t count, const float *x, float *to) {
    SUM("omp simd")
    for (int64_t i = 0; i < count; i++) to[i] += x[i];
}

/* How q, k, v, y and the gradients by q, k and v stand in memory. */
static void strides_of(const block *b, strides *by) {
    int64_t wide = together_width(b), heads = inner(b), d = b->head_width;
    strides in_together = {b->length * wide, d, wide};
    strides in_attended = {b->length * heads, d, heads};
    for (int i = 0; i < 7; i++) by[i] = i == 3 ? in_attended : in_together;
}

#define SHARED_OUT(COUNT)                                                                          \
    _Pragma("omp for schedule(static, 1)")                                                         \
    for (int64_t thread = 0; thread < b->threads; thread++)                                        \
        for (int64_t i = thread * (COUNT) / b->threads; i < (thread + 1) * (COUNT) / b->threads; i++)
#define MINE (rooms + thread * thread_room(b))

void block_forward(const block *b, float *room) {
    int64_t total = b->batch * b->length, d = b->width, units = b->batch * b->kv_heads;
    int64_t heads = inner(b);
    const float *keys = b->together + heads, *values = keys + b->kv_heads * b->head_width;
    sizes n = {b->batch, b->heads, b->kv_heads, b->length, b->head_width};
    strides by[7];
    strides_of(b, by);
    through all[4];
    layers_of(b, 0, all);
    float *rooms = place_strips(all, room);
    int64_t strips = strips_in(all), chunks = chunks_of(b);
    _Pragma("omp parallel num_threads((int)b->threads) if (b->threads > 1)") {
        SHARED_OUT(strips) gather_one(all, i);
        SHARED_OUT(chunks) {
            int64_t row = i * CHUNK, rows = least(CHUNK, total - row);
            norm_rows(b, &b->norm, row, rows, b->x, b->kept, b->normed);
            float *together = b->together + row * together_width(b);
            go_through(&all[0], rows, b->normed + row * d, NULL, together, MINE);
            if (b->rope) turn_rows(b, row, rows, b->together, 1);
        }
        SHARED_OUT(units) {
            int64_t batch = i / b->kv_heads;
            forward_unit(n, batch, i % b->kv_heads, by, b->together, keys, values,
                         b->first + batch * b->length, b->attended, b->logs, MINE);
        }
        SHARED_OUT(chunks) {
            int64_t row = i * CHUNK, rows = least(CHUNK, total - row), f = b->mlp_width;
            float *hidden = b->hidden + row * b->hidden_width, *active = b->active + row * f;
            const float *x = b->x + row * d;
            float *middle = b->middle + row * d;
            go_through(&all[1], rows, b->attended + row * heads, x, middle, MINE);
            if (b->mlp_norm.weight)
                norm_rows(b, &b->mlp_norm, row, rows, b->parallel ? b->x : b->middle, b->mlp_kept,
                          b->mlp_normed);
            go_through(&all[2], rows, b->mlp_normed + row * d, NULL, hidden, MINE);
            ACTIVATIONS[b->activation](rows, f, 1, hidden, active);
            go_through(&all[3], rows, active, middle, b->y + row * d, MINE);
        }
    }
}

/* The gradient by a weight (outputs, inputs) and a bias, of all rows. */
static void by_layer(const block *b, const part *layer, int64_t outputs, int64_t inputs,
                     const float *gradient, const float *x, float *room) {
    int64_t rows = b->batch * b->length;
    if (layer->by_weight)
        product(outputs, inputs, rows, b->threads, gradient, 1, outputs, x, inputs, 1, NULL,
                layer->by_weight, room);
    if (!layer->by_bias) return;
    _Pragma("omp parallel for num_threads((int)b->threads) if (b->threads > 1) schedule(static)")
    for (int64_t column = 0; column < outputs; column += 64) {
        int64_t width = least(64, outputs - column);
        memset(layer->by_bias + column, 0, width * sizeof(float));
        for (int64_t row = 0; row < rows; row++)
            add_rows(width, gradient + row * outputs + column, layer->by_bias + column);
    }
}

/* What the chunks summed, in their order. */
static void by_norm(const block *b, const part *norm, const float *sums) {
    int64_t n = b->width;
    if (norm->by_weight) memset(norm->by_weight, 0, n * sizeof(float));
    if (norm->by_bias) memset(norm->by_bias, 0, n * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks_of(b); chunk++, sums += 8 * n) {
        if (norm->by_weight) add_rows(n, sums, norm->by_weight);
        if (norm->by_bias) add_rows(n, sums + n, norm->by_bias);
    }
}

void block_backward(const block *b, float *room) {
    int64_t total = b->batch * b->length, d = b->width, units = b->batch * b->kv_heads;
    int64_t heads = inner(b), of_values = heads + b->kv_heads * b->head_width;
    int own_norm = b->mlp_norm.weight != NULL;
    sizes n = {b->batch, b->heads, b->kv_heads, b->length, b->head_width};
    strides by[7];
    strides_of(b, by);
    through all[4];
    layers_of(b, 1, all);
    float *sums = place_strips(all, room), *rooms = sums + chunks_of(b) * 8 * d;
    int64_t strips = strips_in(all), chunks = chunks_of(b);
    _Pragma("omp parallel num_threads((int)b->threads) if (b->threads > 1)") {
        SHARED_OUT(strips) gather_one(all, i);
        SHARED_OUT(chunks) {
            int64_t row = i * CHUNK, rows = least(CHUNK, total - row), f = b->mlp_width;
            float *gathered = MINE, *by_active = gathered + gathered_room();
            float *by_normed = by_active + aligned(CHUNK * (f > d ? f : d));
            float *by_hidden = b->by_hidden + row * b->hidden_width;
            const float *gradient = b->gradient + row * d, *by_sum = gradient;
            go_through(&all[3], rows, gradient, NULL, by_active, gathered);
            ACTIVATIONS_BACKWARD[b->activation](rows, f, 1, by_active,
                                                b->hidden + row * b->hidden_width, by_hidden);
            if (!own_norm) by_normed = b->by_mlp_normed + row * d;
            go_through(&all[2], rows, by_hidden, NULL, by_normed, gathered);
            if (own_norm) {
                float *by_middle = b->by_middle + row * d;
                norm_rows_backward(b, &b->mlp_norm, row, rows, by_normed,
                                   b->parallel ? b->x : b->middle, b->mlp_kept, by_middle,
                                   sums + (8 * i + 4) * d);
                add_rows(rows * d, gradient, by_middle);
                /* Falcon: what goes to x by the MLP does not go through attention */
                if (!b->parallel) by_sum = by_middle;
            }
            go_through(&all[1], rows, by_sum, NULL, b->by_attended + row * heads, gathered);
        }
        SHARED_OUT(units) {
            int64_t batch = i / b->kv_heads;
            const float *x = b->together;
            float *by_x = b->by_together;
            backward_unit(n, batch, i % b->kv_heads, by, x, x + heads, x + of_values,
                          b->first + batch * b->length, b->logs, b->by_attended, by_x, by_x + heads,
                          by_x + of_values, MINE);
        }
        SHARED_OUT(chunks) {
            int64_t row = i * CHUNK, rows = least(CHUNK, total - row);
            float *gathered = MINE, *by_normed = gathered + gathered_room();
            const float *added = own_norm ? NULL : b->by_mlp_normed + row * d;
            if (b->rope) turn_rows(b, row, rows, b->by_together, -1);
            const float *together = b->by_together + row * together_width(b);
            const float *beside = (own_norm ? b->by_middle : b->gradient) + row * d;
            float *by_x = b->by_x + row * d;
            go_through(&all[0], rows, together, added, by_normed, gathered);
            norm_rows_backward(b, &b->norm, row, rows, by_normed, b->x, b->kept, by_x,
                               sums + 8 * i * d);
            add_rows(rows * d, beside, by_x);
        }
    }
    by_norm(b, &b->norm, sums);
    if (own_norm) by_norm(b, &b->mlp_norm, sums + 4 * d);
    const float *by_sum = own_norm && !b->parallel ? b->by_middle : b->gradient;
    by_layer(b, &b->qkv, together_width(b), d, b->by_together, b->normed, room);
    by_layer(b, &b->output, d, heads, by_sum, b->attended, room);
    by_layer(b, &b->up, b->hidden_width, d, b->by_hidden, b->mlp_normed, room);
    by_layer(b, &b->down, d, b->mlp_width, b->gradient, b->active, room);
}
