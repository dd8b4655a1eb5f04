/* RMSNorm, LayerNorm, SwiGLU, three GELUs and rotary positions with their gradients, each in one pass
   over memory, in float32 on the CPU. What they say is written out in kernels.py. Called by
   native_train.py and native_block.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_vectors.h"

#define ROWS _Pragma("omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)")
#define SUM(X) _Pragma(X)

/* The first numbers of sixteen, where a row ends before. */
INLINE floats some(const float *x, int64_t count) {
    if (count == 16) return *(const floats *)x;
    floats y = {0};
    memcpy(&y, x, count * sizeof(float));
    return y;
}

INLINE void put(float *to, floats x, int64_t count) {
    if (count == 16) *(floats *)to = x;
    else memcpy(to, &x, count * sizeof(float));
}

/* x, y (rows, n), weight (n), scale (rows): y = x scale weight. */
void rms_norm(int64_t rows, int64_t n, int64_t threads, double epsilon, const float *x,
              const float *weight, float *scale, float *y) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * n;
        float *to = y + row * n, squares = 0;
        SUM("omp simd reduction(+ : squares)")
        for (int64_t i = 0; i < n; i++) squares += from[i] * from[i];
        float s = (float)(1.0 / sqrt((double)squares / n + epsilon));
        scale[row] = s;
        for (int64_t i = 0; i < n; i++) to[i] = from[i] * s * weight[i];
    }
}

/* by_weight (parts + 1, n): the sum is left in its first row; a part is a block of rows, so that
   the order of the sum does not depend on the threads. */
void rms_norm_backward(int64_t rows, int64_t n, int64_t threads, int64_t parts,
                       const float *gradient, const float *x, const float *weight,
                       const float *scale, float *by_x, float *by_weight) {
    int64_t block = (rows + parts - 1) / parts;
    ROWS
    for (int64_t part = 0; part < parts; part++) {
        float *sums = by_weight + (part + 1) * n;
        memset(sums, 0, n * sizeof(float));
        int64_t end = (part + 1) * block < rows ? (part + 1) * block : rows;
        for (int64_t row = part * block; row < end; row++) {
            const float *g = gradient + row * n, *from = x + row * n;
            float *to = by_x + row * n, along = 0, s = scale[row];
            SUM("omp simd reduction(+ : along)")
            for (int64_t i = 0; i < n; i++) along += g[i] * weight[i] * from[i];
            along *= s * s / n;
            SUM("omp simd")
            for (int64_t i = 0; i < n; i++) {
                sums[i] += g[i] * from[i] * s;
                to[i] = s * (g[i] * weight[i] - from[i] * along);
            }
        }
    }
    memcpy(by_weight, by_weight + n, n * sizeof(float));
    for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < n; i++) by_weight[i] += by_weight[(part + 1) * n + i];
}

/* x, y (rows, n), weight and bias (n), mean and scale (rows): y = (x - mean) scale weight + bias. */
void layer_norm(int64_t rows, int64_t n, int64_t threads, double epsilon, const float *x,
                const float *weight, const float *bias, float *mean, float *scale, float *y) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * n;
        float *to = y + row * n, sum = 0, squares = 0;
        SUM("omp simd reduction(+ : sum)")
        for (int64_t i = 0; i < n; i++) sum += from[i];
        float m = sum / n;
        SUM("omp simd reduction(+ : squares)")
        for (int64_t i = 0; i < n; i++) squares += (from[i] - m) * (from[i] - m);
        float s = (float)(1.0 / sqrt((double)squares / n + epsilon));
        mean[row] = m;
        scale[row] = s;
        for (int64_t i = 0; i < n; i++) to[i] = (from[i] - m) * s * weight[i] + bias[i];
    }
}

/* by_both (parts + 1, 2n), by weight and by bias: as in rms_norm_backward. */
void layer_norm_backward(int64_t rows, int64_t n, int64_t threads, int64_t parts,
                         const float *gradient, const float *x, const float *weight,
                         const float *mean, const float *scale, float *by_x, float *by_both) {
    int64_t block = (rows + parts - 1) / parts;
    ROWS
    for (int64_t part = 0; part < parts; part++) {
        float *sums = by_both + (part + 1) * 2 * n;
        memset(sums, 0, 2 * n * sizeof(float));
        int64_t end = (part + 1) * block < rows ? (part + 1) * block : rows;
        for (int64_t row = part * block; row < end; row++) {
            const float *g = gradient + row * n, *from = x + row * n;
            float *to = by_x + row * n, along = 0, total = 0, m = mean[row], s = scale[row];
            SUM("omp simd reduction(+ : along, total)")
            for (int64_t i = 0; i < n; i++) {
                total += g[i] * weight[i];
                along += g[i] * weight[i] * (from[i] - m);
            }
            total /= n;
            along *= s * s / n;
            SUM("omp simd")
            for (int64_t i = 0; i < n; i++) {
                sums[i] += g[i] * (from[i] - m) * s;
                sums[n + i] += g[i];
                to[i] = s * (g[i] * weight[i] - total - (from[i] - m) * along);
            }
        }
    }
    memcpy(by_both, by_both + 2 * n, 2 * n * sizeof(float));
    for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < 2 * n; i++) by_both[i] += by_both[(part + 1) * 2 * n + i];
}

/* gate_and_up (rows, 2n), y (rows, n): y = silu(gate) up. */
void swiglu(int64_t rows, int64_t n, int64_t threads, const float *gate_and_up, float *y) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_and_up + row * 2 * n, *up = gate + n;
        float *to = y + row * n;
        for (int64_t i = 0; i < n; i += 16) {
            int64_t count = n - i < 16 ? n - i : 16;
            floats a = some(gate + i, count), b = some(up + i, count);
            put(to + i, a / (1.0f + exponential(-a)) * b, count);
        }
    }
}

void swiglu_backward(int64_t rows, int64_t n, int64_t threads, const float *gradient,
                     const float *gate_and_up, float *by_both) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_and_up + row * 2 * n, *up = gate + n, *g = gradient + row * n;
        float *by_gate = by_both + row * 2 * n, *by_up = by_gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            int64_t count = n - i < 16 ? n - i : 16;
            floats a = some(gate + i, count), b = some(up + i, count), c = some(g + i, count);
            floats open = 1.0f / (1.0f + exponential(-a));
            put(by_up + i, c * a * open, count);
            put(by_gate + i, c * b * open * (1.0f + a * (1.0f - open)), count);
        }
    }
}

/* i goes over the sixteens of every row; LEFT of them are there. */
#define SIXTEENS                                                                                   \
    ROWS for (int64_t row = 0; row < rows; row++) for (int64_t i = row * n; i < (row + 1) * n; i += 16)
#define LEFT ((row + 1) * n - i < 16 ? (row + 1) * n - i : 16)

/* x, y (rows, n): y = x / (1 + e^(-1.702 x)). */
void quick_gelu(int64_t rows, int64_t n, int64_t threads, const float *x, float *y) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count);
        put(y + i, a / (1.0f + exponential(-1.702f * a)), count);
    }
}

void quick_gelu_backward(int64_t rows, int64_t n, int64_t threads, const float *gradient,
                         const float *x, float *by_x) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count), open = 1.0f / (1.0f + exponential(-1.702f * a));
        put(by_x + i, some(gradient + i, count) * open * (1.0f + 1.702f * a * (1.0f - open)),
            count);
    }
}

/* GELU by the tangent (GPT-2's): x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). */
#define TANGENT 1.5957691216f /* 2 sqrt(2/pi) */

void gelu_tanh(int64_t rows, int64_t n, int64_t threads, const float *x, float *y) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count), twice = TANGENT * a * (1.0f + 0.044715f * a * a);
        put(y + i, a / (1.0f + exponential(-twice)), count);
    }
}

void gelu_tanh_backward(int64_t rows, int64_t n, int64_t threads, const float *gradient,
                        const float *x, float *by_x) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count), square = a * a;
        floats open = 1.0f / (1.0f + exponential(-TANGENT * a * (1.0f + 0.044715f * square)));
        floats slope = TANGENT * (1.0f + 0.134145f * square);
        put(by_x + i, some(gradient + i, count) * open * (1.0f + a * slope * (1.0f - open)),
            count);
    }
}

/* The normal distribution function, and e^(-x^2/2), within 1.2e-7 of their size: Press et al., Numerical
   Recipes, section 6.2 (erfcc). */
INLINE floats normal_cdf(floats x, floats *bell) {
    const floats zero = {0};
    ints negative = x < zero;
    floats z = (floats)((ints)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
    *bell = exponential(-z * z);
    floats y = zero + 0.17087277f;
    y = y * t - 0.82215223f;
    y = y * t + 1.48851587f;
    y = y * t - 1.13520398f;
    y = y * t + 0.27886807f;
    y = y * t - 0.18628806f;
    y = y * t + 0.09678418f;
    y = y * t + 0.37409196f;
    y = y * t + 1.00002368f;
    floats tail = 0.5f * t * exponential(y * t - 1.26551223f) * *bell;
    return (floats)(((ints)tail & negative) | ((ints)(1.0f - tail) & ~negative));
}

/* GELU (Hendrycks & Gimpel 2016): x times the normal distribution function. */
void gelu(int64_t rows, int64_t n, int64_t threads, const float *x, float *y) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count), bell;
        put(y + i, a * normal_cdf(a, &bell), count);
    }
}

void gelu_backward(int64_t rows, int64_t n, int64_t threads, const float *gradient, const float *x,
                   float *by_x) {
    SIXTEENS {
        int64_t count = LEFT;
        floats a = some(x + i, count), bell, below = normal_cdf(a, &bell);
        put(by_x + i, some(gradient + i, count) * (below + 0.39894228f * a * bell), count);
    }
}

/* Heads of d numbers, turned by the angles of their position, forth (+1) or back (-1): rope is
   (2, T, d). Of one head after another: x at batch, time and head strides. */
INLINE void turn(const float *x, float *y, const float *cos, const float *sin, int64_t half,
                 float direction) {
    SUM("omp simd")
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = a * cos[i] + direction * (b * sin[i]);
        y[i + half] = b * cos[i + half] + direction * (a * sin[i + half]);
    }
}

/* qkv (B, T, (H + 2K) d) to q (B, T, H, d), k and v (B, T, K, d), q and k turned. */
void split_heads(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t d,
                 int64_t threads, const float *rope, const float *qkv, float *q, float *k,
                 float *v) {
    ROWS
    for (int64_t row = 0; row < batch * length; row++) {
        const float *cos = rope + row % length * d, *sin = cos + length * d;
        const float *x = qkv + row * (heads + 2 * kv_heads) * d;
        for (int64_t h = 0; h < heads; h++, x += d)
            turn(x, q + (row * heads + h) * d, cos, sin, d / 2, 1);
        for (int64_t h = 0; h < kv_heads; h++, x += d)
            turn(x, k + (row * kv_heads + h) * d, cos, sin, d / 2, 1);
        memcpy(v + row * kv_heads * d, x, kv_heads * d * sizeof(float));
    }
}

/* The way back; strides (batch, time, head) of each of the three gradients. */
void join_heads(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t d,
                int64_t threads, const float *rope, const float *q, const float *k,
                const float *v, const int64_t *strides, float *qkv) {
    const int64_t *a = strides, *b = strides + 3, *c = strides + 6;
    ROWS
    for (int64_t row = 0; row < batch * length; row++) {
        int64_t n = row / length, t = row % length;
        const float *cos = rope + t * d, *sin = cos + length * d;
        float *x = qkv + row * (heads + 2 * kv_heads) * d;
        for (int64_t h = 0; h < heads; h++, x += d)
            turn(q + n * a[0] + t * a[1] + h * a[2], x, cos, sin, d / 2, -1);
        for (int64_t h = 0; h < kv_heads; h++, x += d)
            turn(k + n * b[0] + t * b[1] + h * b[2], x, cos, sin, d / 2, -1);
        for (int64_t h = 0; h < kv_heads; h++, x += d)
            memcpy(x, v + n * c[0] + t * c[1] + h * c[2], d * sizeof(float));
    }
}
