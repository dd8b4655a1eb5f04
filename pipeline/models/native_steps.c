/* A few inputs of a decoder-only Transformer through all its layers, on the CPU.

   What torch does in some twenty small operations a layer is one function here, so that a step
   of generation costs little more than reading the weights. They are read where torch keeps
   them, (out, in) row by row. Every number is summed in one order, whatever the threads and
   however many inputs go together.

   Legend: M inputs, D width, H heads, K key/value heads, d width of a head, F of the MLP,
   P numbers a conditional, S slots of the cache, L layers. Called by native_steps.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include "native_vectors.h"


enum { FLOAT32, BFLOAT16, INT8 };                     /* of weights; the cache is never INT8 */
enum { LAYERNORM, RMSNORM };
enum { GELU, GELU_TANH, QUICK_GELU, SWIGLU };
enum { SEQUENTIAL, PARALLEL, PARALLEL_TWO_NORMS };

/* Layouts are those of native_steps.py. A scale is of INT8 weights only; biases may be missing. */
typedef struct { const void *weight; const float *scale, *bias; } Matrix;
typedef struct { const float *weight, *bias; } Norm;
typedef struct { Norm attention_norm, mlp_norm; Matrix qkv, attended, mlp_in, mlp_out; } Layer;
typedef struct {
    int64_t layers, width, heads, kv_heads, head_width, mlp_width, outputs, slots, batch;
    int64_t weights, cached, norm, activation, block; /* kinds, as above */
    double epsilon;
    const Layer *layer;
    Norm final_norm;
    Matrix head;
    const float *rope;                                /* (2, T, d), or none */
    void *keys, *values;                              /* (L, B, K, S, d) */
} Model;

INLINE float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t narrow(float x) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE floats load(const void *x, int64_t i, int kind) {
    if (kind == FLOAT32) return *(const floats *)((const float *)x + i);
    if (kind == BFLOAT16) {
        halves h = *(const halves *)((const uint16_t *)x + i);
        return (floats)(__builtin_convertvector(h, ints) << 16);
    }
#ifdef __AVX512F__
    __m128i b = _mm_loadu_si128((const __m128i *)((const int8_t *)x + i));
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
#else
    bytes b = *(const bytes *)((const int8_t *)x + i);
    return __builtin_convertvector(b, floats);
#endif
}

INLINE float load_one(const void *x, int64_t i, int kind) {
    if (kind == FLOAT32) return ((const float *)x)[i];
    if (kind == BFLOAT16) return widen(((const uint16_t *)x)[i]);
    return ((const int8_t *)x)[i];
}

INLINE int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

INLINE float sum(floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float y[16];
    memcpy(y, &x, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
    return y[0];
#endif
}

INLINE float exponential_one(float x) { return exponential((floats){x})[0]; }

/* out[m][o] (+)= sum_i w[o][i] x[m][i]: ROWS rows of w against COLS inputs. While they are
   multiplied, the rows after them are fetched: `ahead` rows are still to come, 0 fetches none. */
INLINE void tile(const void *w, int64_t n, int kind, int rows, const float *x, int64_t x_stride,
                 int cols, float *out /* rows x cols */, int64_t ahead) {
    floats acc[4][4];
    const char *bytes_of_w = w;
    int64_t size = size_of(kind), stride = n * size;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) acc[r][c] = (floats){0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        floats v[4];
        for (int c = 0; c < cols; c++) v[c] = load(x + c * x_stride, i, FLOAT32);
        for (int r = 0; r < rows; r++) {
            floats row = load(bytes_of_w + r * stride, i, kind);
            if (ahead >= rows && (i * size) % 64 == 0)
                __builtin_prefetch(bytes_of_w + (r + rows) * stride + i * size, 0, 3);
            for (int c = 0; c < cols; c++) acc[r][c] += row * v[c];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float y = sum(acc[r][c]);
            for (int64_t j = i; j < n; j++)
                y += load_one(bytes_of_w + r * stride, j, kind) * x[c * x_stride + j];
            out[r * cols + c] = y;
        }
}

INLINE void tiles_of(Matrix w, int64_t n, int kind, int rows, const float *x, int64_t x_stride,
                     int64_t m, float *out, int64_t out_stride, int add, int64_t o, int64_t end) {
    const char *at = (const char *)w.weight + o * n * size_of(kind);
    float y[16];
    for (int64_t c = 0; c < m;) {
        int cols = m - c >= 4 ? 4 : m - c >= 2 ? 2 : 1;
        int64_t ahead = c == 0 ? end - o - rows : 0;
        const float *v = x + c * x_stride;
        if (cols == 4) tile(at, n, kind, rows, v, x_stride, 4, y, ahead);
        else if (cols == 2) tile(at, n, kind, rows, v, x_stride, 2, y, ahead);
        else tile(at, n, kind, rows, v, x_stride, 1, y, ahead);
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < cols; k++) {
                float z = y[r * cols + k];
                if (kind == INT8) z *= w.scale[o + r];
                if (w.bias) z += w.bias[o + r];
                float *to = out + (c + k) * out_stride + o + r;
                *to = add ? *to + z : z;
            }
        c += cols;
    }
}

/* Whether rows are read one after another: where the inputs stay in the innermost cache, one stream
   of addresses is what the processor's own prefetcher follows best (1.4 to 2.1 times the rate of
   four rows at a time that are fetched by hand). Else four rows share what is read of x. */
INLINE int alone(int kind, int64_t m, int64_t n) {
    return m * n < 4096 && (kind != FLOAT32 || n < 2048) && (kind != INT8 || m <= 2);
}

#define PRODUCT(NAME, KIND)                                                                      \
    static void NAME(Matrix w, int64_t n, const float *x, int64_t x_stride, int64_t m,           \
                     float *out, int64_t out_stride, int add, int64_t o, int64_t end) {          \
        for (; !alone(KIND, m, n) && o + 4 <= end; o += 4)                                       \
            tiles_of(w, n, KIND, 4, x, x_stride, m, out, out_stride, add, o, end);               \
        for (; o < end; o++)                                                                     \
            tiles_of(w, n, KIND, 1, x, x_stride, m, out, out_stride, add, o, o + 1);             \
    }
PRODUCT(product_float32, FLOAT32)
PRODUCT(product_bfloat16, BFLOAT16)
PRODUCT(product_int8, INT8)

/* Outputs o .. end-1 of x (M, n) through a matrix, into (or onto) out (M, ...). */
static void product(const Model *model, Matrix w, int64_t n, const float *x, int64_t x_stride,
                    int64_t m, float *out, int64_t out_stride, int add, int64_t o, int64_t end) {
    if (model->weights == FLOAT32)
        product_float32(w, n, x, x_stride, m, out, out_stride, add, o, end);
    else if (model->weights == BFLOAT16)
        product_bfloat16(w, n, x, x_stride, m, out, out_stride, add, o, end);
    else
        product_int8(w, n, x, x_stride, m, out, out_stride, add, o, end);
}

static void normalise(const Model *model, Norm norm, const float *h, int64_t m, float *out) {
    int64_t n = model->width;
    for (int64_t row = 0; row < m; row++, h += n, out += n) {
        float mean = 0;
        floats part = {0};
        int64_t i = 0;
        if (model->norm == LAYERNORM) {
            for (; i + 16 <= n; i += 16) part += load(h, i, FLOAT32);
            double total = sum(part);
            for (; i < n; i++) total += h[i];
            mean = (float)(total / n);
        }
        part = (floats){0};
        for (i = 0; i + 16 <= n; i += 16) {
            floats x = load(h, i, FLOAT32) - mean;
            part += x * x;
        }
        double squares = sum(part);
        for (; i < n; i++) squares += (double)(h[i] - mean) * (h[i] - mean);
        float scale = (float)(1.0 / sqrt(squares / n + model->epsilon));
        for (i = 0; i < n; i++) out[i] = (h[i] - mean) * scale * norm.weight[i];
        if (norm.bias)
            for (i = 0; i < n; i++) out[i] += norm.bias[i];
    }
}

static void activate(int64_t kind, float *x, int64_t gate_to_up, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += 16) {
        int64_t count = end - i < 16 ? end - i : 16;
        float in[16] = {0}, result[16];
        memcpy(in, x + i, count * 4);
        floats v = load(in, 0, FLOAT32), y;
        if (kind == GELU) {
            for (int64_t j = 0; j < count; j++)
                result[j] = 0.5f * in[j] * (1 + erff(in[j] * 0.70710678f));
        } else {
            floats u = v; /* SWIGLU: silu */
            if (kind == GELU_TANH) /* (1 + tanh u) / 2 is 1 / (1 + e^-2u) */
                u = 1.5957691216f * (v + 0.044715f * v * v * v);
            else if (kind == QUICK_GELU)
                u = 1.702f * v;
            y = v / (1.0f + exponential(-u));
            memcpy(result, &y, 64);
            if (kind == SWIGLU)
                for (int64_t j = 0; j < count; j++) result[j] *= x[i + gate_to_up + j];
        }
        memcpy(x + i, result, count * 4);
    }
}

INLINE void store(void *to, int64_t i, int kind, float x) {
    if (kind == FLOAT32) ((float *)to)[i] = x;
    else ((uint16_t *)to)[i] = narrow(x);
}

static void turn(const float *cos, const float *sin, float *x, int64_t d) {
    int64_t half = d / 2; /* sin holds minus the sines, then the sines */
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* softmax(q k^T / sqrt(d)) v over `held` slots from `oldest` on, in the order of positions: they
   go round a ring of `slots`. */
INLINE void attend(const float *q, const char *keys, const char *values, int kind, int64_t d,
                   int64_t oldest, int64_t held, int64_t slots, float *scores, float *out) {
    float top = -INFINITY, factor = 1 / sqrtf((float)d), total;
    int64_t size = size_of(kind);
#define SLOT(s) (oldest + (s) < slots ? oldest + (s) : oldest + (s) - slots)
    for (int64_t s = 0; s < held; s++) {
        const char *k = keys + SLOT(s) * d * size;
        floats acc = {0};
        int64_t i = 0;
        for (; i + 16 <= d; i += 16) acc += load(q, i, FLOAT32) * load(k, i, kind);
        float y = sum(acc);
        for (; i < d; i++) y += q[i] * load_one(k, i, kind);
        y *= factor;
        scores[s] = y;
        top = y > top ? y : top;
    }
    int64_t s = 0;
    floats part = {0};
    for (; s + 16 <= held; s += 16) {
        floats e = exponential(load(scores, s, FLOAT32) - top);
        *(floats *)(scores + s) = e;
        part += e;
    }
    total = sum(part);
    for (; s < held; s++) total += scores[s] = exponential_one(scores[s] - top);
    total = 1 / total;
    int64_t i = 0;
    for (; i + 64 <= d; i += 64) {
        floats a = {0}, b = a, c = a, e = a;
        for (s = 0; s < held; s++) {
            const char *v = values + (SLOT(s) * d + i) * size;
            a += scores[s] * load(v, 0, kind);
            b += scores[s] * load(v, 16, kind);
            c += scores[s] * load(v, 32, kind);
            e += scores[s] * load(v, 48, kind);
        }
        *(floats *)(out + i) = a * total;
        *(floats *)(out + i + 16) = b * total;
        *(floats *)(out + i + 32) = c * total;
        *(floats *)(out + i + 48) = e * total;
    }
    for (; i + 16 <= d; i += 16) {
        floats a = {0};
        for (s = 0; s < held; s++) a += scores[s] * load(values + (SLOT(s) * d + i) * size, 0, kind);
        *(floats *)(out + i) = a * total;
    }
    for (; i < d; i++) {
        float y = 0;
        for (s = 0; s < held; s++) y += scores[s] * load_one(values, SLOT(s) * d + i, kind);
        out[i] = y * total;
    }
#undef SLOT
}

/* This thread's share of n outputs, in whole tiles. */
static void share(int64_t n, int64_t unit, int thread, int threads, int64_t *first, int64_t *end) {
    int64_t units = (n + unit - 1) / unit;
    *first = units * thread / threads * unit;
    *end = units * (thread + 1) / threads * unit;
    if (*first > n) *first = n;
    if (*end > n) *end = n;
}

#ifdef _OPENMP
#define BARRIER _Pragma("omp barrier")
#else
#define BARRIER
#endif

/* Numbers of scratch, a part that threads share and one for each. */
int64_t scratch_size(const Model *a, int64_t m, int64_t threads) {
    int64_t inner = a->heads * a->head_width;
    int64_t qkv = inner + 2 * a->kv_heads * a->head_width;
    return m * (qkv + inner + 2 * a->mlp_width) + threads * (2 * m * a->width + a->slots + 64);
}

/* h (M, D), embedded, is overwritten; logits (M, P). Input i belongs to row `rows[i]` of the
   cache, stands at `positions[i]`, is kept in the slot of that number (round the ring) and sees
   the inputs from `oldest[i]` to itself: no later one of the call may lie in their slots. */
void step(const Model *a, int64_t m, int64_t threads, const int64_t *rows,
          const int64_t *positions, const int64_t *oldest, int64_t rope_length, float *h,
          float *scratch, float *logits) {
    const int64_t D = a->width, H = a->heads, K = a->kv_heads, d = a->head_width;
    const int64_t F = a->mlp_width, inner = H * d, N = inner + 2 * K * d;
    const int64_t wide = a->activation == SWIGLU ? 2 * F : F;
    float *qkv = scratch, *attended = qkv + m * N, *mlp = attended + m * inner;
    float *own = mlp + m * 2 * F;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) if (threads > 1)
#endif
    {
        int thread = 0, team = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num();
        team = omp_get_num_threads();
#endif
        float *normed = own + thread * (2 * m * D + a->slots + 64);
        float *second = normed + m * D, *scores = second + m * D;
        int64_t first, end;
        for (int64_t l = 0; l < a->layers; l++) {
            const Layer *layer = a->layer + l;
            int64_t size = size_of(a->cached), at = l * a->batch * K * a->slots * d;
            char *keys = (char *)a->keys + at * size, *values = (char *)a->values + at * size;

            normalise(a, layer->attention_norm, h, m, normed);
            share(N, 4, thread, team, &first, &end);
            product(a, layer->qkv, D, normed, D, m, qkv, N, 0, first, end);
            BARRIER
            share(m * (H + K), 1, thread, team, &first, &end);
            for (int64_t task = first; task < end; task++) {
                int64_t i = task / (H + K), head = task % (H + K);
                float *x = qkv + i * N + head * d;
                if (a->rope) {
                    const float *angle = a->rope + positions[i] * d;
                    turn(angle, angle + rope_length * d, x, d);
                }
                if (head < H) continue;
                int64_t slot = ((rows[i] * K + head - H) * a->slots + positions[i] % a->slots) * d;
                for (int64_t j = 0; j < d; j++) {
                    store(keys, slot + j, a->cached, x[j]);
                    store(values, slot + j, a->cached, x[K * d + j]);
                }
            }
            BARRIER
            share(m * H, 1, thread, team, &first, &end);
            for (int64_t task = first; task < end; task++) {
                int64_t i = task / H, head = task % H;
                int64_t start = (rows[i] * K + head / (H / K)) * a->slots * d * size;
                const float *q = qkv + i * N + head * d;
                float *out = attended + i * inner + head * d;
                int64_t from = oldest[i] % a->slots, held = positions[i] - oldest[i] + 1;
                const char *k = keys + start, *v = values + start;
                if (a->cached == FLOAT32)
                    attend(q, k, v, FLOAT32, d, from, held, a->slots, scores, out);
                else
                    attend(q, k, v, BFLOAT16, d, from, held, a->slots, scores, out);
            }
            if (a->block == PARALLEL_TWO_NORMS) normalise(a, layer->mlp_norm, h, m, second);
            BARRIER
            share(D, 4, thread, team, &first, &end);
            product(a, layer->attended, inner, attended, inner, m, h, D, 1, first, end);
            const float *in = normed;
            if (a->block == SEQUENTIAL) {
                BARRIER
                normalise(a, layer->mlp_norm, h, m, normed);
            } else if (a->block == PARALLEL_TWO_NORMS) {
                in = second;
            }
            share(F, 4, thread, team, &first, &end);
            product(a, layer->mlp_in, D, in, D, m, mlp, wide, 0, first, end);
            if (a->activation == SWIGLU)
                product(a, layer->mlp_in, D, in, D, m, mlp, wide, 0, F + first, F + end);
            for (int64_t i = 0; i < m; i++)
                activate(a->activation, mlp + i * wide, F, first, end);
            BARRIER
            share(D, 4, thread, team, &first, &end);
            product(a, layer->mlp_out, F, mlp, wide, m, h, D, 1, first, end);
            BARRIER
        }
        normalise(a, a->final_norm, h, m, normed);
        share(a->outputs, 4, thread, team, &first, &end);
        product(a, a->head, D, normed, D, m, logits, a->outputs, 0, first, end);
    }
}
