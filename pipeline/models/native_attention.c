/* Causal attention with its gradients, in float32 on the CPU, for sequences whose scores fit in a
   cache: blocks of queries against all keys that they see. Called by native_attention.py.

   Query t sees the keys first[t] to t; first never falls along a sequence. Softmax and its
   gradient as in Dao 2023 (FlashAttention-2), appendix B: the logarithm of each row's sum is kept,
   the weights are made again on the way back. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_vectors.h"

#define QUERIES 32
#define UP(N) (((N) + 15) / 16 * 16)
#ifdef __clang__
#define SHUFFLED(X, ...) __builtin_shufflevector(X, X, __VA_ARGS__)
#else
#define SHUFFLED(X, ...) __builtin_shuffle(X, (ints){__VA_ARGS__})
#endif
#define WIDEST (LANES == 16 ? 4 : 2) /* registers across; four rows of them are sums */

/* B, H, K, T, d; how far apart batches, heads and positions are in each of the tensors. */
typedef struct { int64_t batch, head, time; } strides;
typedef struct { int64_t batch, heads, kv_heads, length, width; } sizes;

INLINE void cell(int rows, int vectors, int64_t k, const float *a, int64_t row, int64_t column,
                 const float *b, int64_t ldb, float *c, int64_t ldc, int add) {
    lanes sums[4][4];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < vectors; j++)
            sums[i][j] = add ? *(const lanes *)(c + i * ldc + LANES * j) : (lanes){0};
    for (int64_t l = 0; l < k; l++) {
        lanes line[4];
        UNROLLED for (int j = 0; j < vectors; j++) line[j] = *(const lanes *)(b + l * ldb + LANES * j);
        UNROLLED for (int i = 0; i < rows; i++) {
            float factor = a[i * row + l * column];
            UNROLLED for (int j = 0; j < vectors; j++) sums[i][j] += factor * line[j];
        }
    }
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < vectors; j++) *(lanes *)(c + i * ldc + LANES * j) = sums[i][j];
}

#define COLUMNS(VECTORS)                                                                           \
    for (; n - j >= LANES * VECTORS; j += LANES * VECTORS) {                                       \
        int64_t i = 0;                                                                             \
        for (; m - i >= 4; i += 4)                                                                 \
            cell(4, VECTORS, k, a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, add);  \
        for (; i < m; i++)                                                                         \
            cell(1, VECTORS, k, a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, add);  \
    }

/* C (m, n) = or += A (m, k) B (k, n), n in whole sixteens; A's elements at any strides. */
INLINE void matrices_of(int add, int64_t m, int64_t n, int64_t k, const float *a, int64_t row,
                        int64_t column, const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t j = 0;
    if (WIDEST >= 4) COLUMNS(4)
    if (WIDEST >= 2) COLUMNS(2)
    COLUMNS(1)
}

static void matrices(int64_t m, int64_t n, int64_t k, const float *a, int64_t row, int64_t column,
                     const float *b, int64_t ldb, float *c, int64_t ldc) {
    matrices_of(0, m, n, k, a, row, column, b, ldb, c, ldc);
}

static void add_matrices(int64_t m, int64_t n, int64_t k, const float *a, int64_t row,
                         int64_t column, const float *b, int64_t ldb, float *c, int64_t ldc) {
    matrices_of(1, m, n, k, a, row, column, b, ldb, c, ldc);
}

/* x (T, d) to (d, T in whole sixteens). */
static void transpose(int64_t length, int64_t width, const float *x, int64_t time, float *y) {
    int64_t whole = UP(length);
    for (int64_t t = 0; t < length; t += 16)
        for (int64_t i = 0; i < width; i++) {
            float *to = y + i * whole + t;
            for (int64_t s = 0; s < 16; s++) to[s] = t + s < length ? x[(t + s) * time + i] : 0;
        }
}

INLINE ints between(int64_t column, int64_t low, int64_t high) {
    const ints here = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints at = here + (int32_t)column;
    return (at >= (int32_t)low) & (at < (int32_t)high);
}

INLINE floats where(ints mask, floats x, floats y) {
    return (floats)(((ints)x & mask) | ((ints)y & ~mask));
}

INLINE float total(floats x) {
    x += SHUFFLED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

INLINE float most(floats x) {
    floats y = SHUFFLED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x = where(x > y, x, y);
    y = SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x = where(x > y, x, y);
    y = SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x = where(x > y, x, y);
    return x[0] > x[1] ? x[0] : x[1];
}

/* Scores to e^(scale score - shift) in columns low..high-1, 0 in the others; what they sum to. */
INLINE float weigh(float *row, int64_t count, int64_t low, int64_t high, float scale, float shift) {
    const floats zero = {0};
    floats sum = zero;
    int64_t start = low / 16 * 16, end = UP(high);
    for (int64_t j = 0; j < start; j += 16) *(floats *)(row + j) = zero;
    for (int64_t j = end; j < count; j += 16) *(floats *)(row + j) = zero;
    for (int64_t j = start; j < end; j += 16) {
        floats x = exponential(*(floats *)(row + j) * scale - shift);
        x = where(between(j, low, high), x, zero);
        *(floats *)(row + j) = x;
        sum += x;
    }
    return total(sum);
}

INLINE float greatest(const float *row, int64_t low, int64_t high) {
    floats found = (floats){0} - INFINITY;
    for (int64_t j = low / 16 * 16; j < high; j += 16) {
        floats x = where(between(j, low, high), *(const floats *)(row + j), (floats){0} - INFINITY);
        found = where(x > found, x, found);
    }
    return most(found);
}

/* Floats that a thread works in. */
int64_t attention_room(int64_t length, int64_t width) { return 2 * (QUERIES + width) * UP(length); }

static void forward_unit(sizes n, int64_t batch, int64_t kv, const strides *by, const float *q,
                         const float *k, const float *v, const int64_t *first, float *y,
                         float *logs, float *room) {
    int64_t group = n.heads / n.kv_heads, whole = UP(n.length), d = n.width;
    float scale = 1 / sqrtf(d), *keys = room, *scores = keys + d * whole;
    k += batch * by[1].batch + kv * by[1].head;
    v += batch * by[2].batch + kv * by[2].head;
    transpose(n.length, d, k, by[1].time, keys);
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        const float *queries = q + batch * by[0].batch + head * by[0].head;
        float *to = y + batch * by[3].batch + head * by[3].head;
        float *kept = logs + (batch * n.heads + head) * n.length;
        for (int64_t t = 0; t < n.length; t += QUERIES) {
            int64_t rows = n.length - t < QUERIES ? n.length - t : QUERIES;
            int64_t begin = first[t] / 16 * 16, seen = t + rows - begin, columns = UP(seen);
            matrices(rows, columns, d, queries + t * by[0].time, by[0].time, 1, keys + begin, whole,
                     scores, columns);
            float factors[QUERIES];
            for (int64_t i = 0; i < rows; i++) {
                float *row = scores + i * columns;
                int64_t low = first[t + i] - begin, high = t + i + 1 - begin;
                float shift = greatest(row, low, high) * scale;
                float sum = weigh(row, columns, low, high, scale, shift);
                kept[t + i] = shift + logf(sum);
                factors[i] = 1 / sum;
            }
            matrices(rows, d, seen, scores, columns, 1, v + begin * by[2].time, by[2].time,
                     to + t * by[3].time, by[3].time);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < d; j++) to[(t + i) * by[3].time + j] *= factors[i];
        }
    }
}

/* q (B, H, T, d), k and v (B, K, T, d) to y (B, H, T, d) and logs (B, H, T). strides: of batch, head
   and time in q, k, v, y; first (B, T); room: attention_room() floats a thread. */
void attention(int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t width,
               int64_t threads, const strides *by, const float *q, const float *k, const float *v,
               const int64_t *first, float *y, float *logs, float *room) {
    sizes n = {batch, heads, kv_heads, length, width};
    _Pragma("omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)")
    for (int64_t part = 0; part < threads; part++)
        for (int64_t unit = part; unit < batch * kv_heads; unit += threads)
            forward_unit(n, unit / kv_heads, unit % kv_heads, by, q, k, v,
                         first + unit / kv_heads * length, y, logs,
                         room + part * attention_room(length, width));
}

static void backward_unit(sizes n, int64_t batch, int64_t kv, const strides *by, const float *q,
                          const float *k, const float *v, const int64_t *first, const float *logs,
                          const float *gradient, float *by_q, float *by_k, float *by_v,
                          float *room) {
    int64_t group = n.heads / n.kv_heads, whole = UP(n.length), d = n.width;
    float scale = 1 / sqrtf(d), *keys = room, *values = keys + d * whole;
    float *weights = values + d * whole, *slopes = weights + QUERIES * whole;
    k += batch * by[1].batch + kv * by[1].head;
    v += batch * by[2].batch + kv * by[2].head;
    by_k += batch * by[5].batch + kv * by[5].head;
    by_v += batch * by[6].batch + kv * by[6].head;
    transpose(n.length, d, k, by[1].time, keys);
    transpose(n.length, d, v, by[2].time, values);
    for (int64_t t = 0; t < n.length; t++) {
        memset(by_k + t * by[5].time, 0, d * sizeof(float));
        memset(by_v + t * by[6].time, 0, d * sizeof(float));
    }
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        const float *queries = q + batch * by[0].batch + head * by[0].head;
        const float *g = gradient + batch * by[3].batch + head * by[3].head;
        float *to = by_q + batch * by[4].batch + head * by[4].head;
        const float *kept = logs + (batch * n.heads + head) * n.length;
        for (int64_t t = 0; t < n.length; t += QUERIES) {
            int64_t rows = n.length - t < QUERIES ? n.length - t : QUERIES;
            int64_t begin = first[t] / 16 * 16, seen = t + rows - begin, columns = UP(seen);
            const float *some = queries + t * by[0].time, *given = g + t * by[3].time;
            matrices(rows, columns, d, some, by[0].time, 1, keys + begin, whole, weights, columns);
            matrices(rows, columns, d, given, by[3].time, 1, values + begin, whole, slopes, columns);
            for (int64_t i = 0; i < rows; i++) {
                float *w = weights + i * columns, *s = slopes + i * columns;
                float sum = weigh(w, columns, first[t + i] - begin, t + i + 1 - begin, scale,
                                  kept[t + i]);
                floats along = {0};
                int64_t end = UP(t + i + 1 - begin);
                for (int64_t j = 0; j < end; j += 16)
                    along += *(floats *)(w + j) * *(floats *)(s + j);
                float mean = total(along) / sum; /* so that rounding moves no key's bias */
                for (int64_t j = 0; j < columns; j += 16)
                    *(floats *)(s + j) = *(floats *)(w + j) * (*(floats *)(s + j) - mean) * scale;
            }
            add_matrices(seen, d, rows, weights, 1, columns, given, by[3].time,
                         by_v + begin * by[6].time, by[6].time);
            add_matrices(seen, d, rows, slopes, 1, columns, some, by[0].time,
                         by_k + begin * by[5].time, by[5].time);
            matrices(rows, d, seen, slopes, columns, 1, k + begin * by[1].time, by[1].time,
                     to + t * by[4].time, by[4].time);
        }
    }
}

/* The way back; strides: of q, k, v, the gradient, and the gradients by q, k and v. Heads that share
   a key are taken by one thread, in their order. */
void attention_backward(int64_t batch, int64_t heads, int64_t kv_heads, int64_t length,
                        int64_t width, int64_t threads, const strides *by, const float *q,
                        const float *k, const float *v, const int64_t *first, const float *logs,
                        const float *gradient, float *by_q, float *by_k, float *by_v,
                        float *room) {
    sizes n = {batch, heads, kv_heads, length, width};
    _Pragma("omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)")
    for (int64_t part = 0; part < threads; part++)
        for (int64_t unit = part; unit < batch * kv_heads; unit += threads)
            backward_unit(n, unit / kv_heads, unit % kv_heads, by, q, k, v,
                          first + unit / kv_heads * length, logs, gradient, by_q, by_k, by_v,
                          room + part * attention_room(length, width));
}
