/* Products of matrices in float32 on the CPU. Called by native_product.py.

   Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": B stands in strips
   of as many columns as fit in registers, a slice of its depth at a time; a tile of the result is
   summed in registers. Each number is summed in the order of its depth, however many threads. */

#include <stdint.h>
#include <string.h>

#include "native_vectors.h"

#define UNROLLED _Pragma("GCC unroll 16")
#ifdef __AVX512F__
#define ROWS 12 /* of a tile: with its columns, what 32 (or 16) registers hold */
#define VECTORS 2
#else
#define ROWS 6
#define VECTORS 1
#endif
#define COLUMNS (16 * VECTORS)
#define DEPTH 512 /* a strip of it, and the rows against it, stay in the second cache */
#define BLOCK 96  /* rows that one thread takes at once, about */

/* Numbers at x, `down` apart from row to row and `along` from column to column. */
typedef struct { const float *x; int64_t down, along; } matrix;
/* What a tile begins with: zeros, or what stands in `added` (rows `down` apart) and `bias`. */
typedef struct { const float *added; int64_t down; const float *bias; } beginning;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

/* `count` lines (the columns of x) of `depth` numbers each, to (depth, full); zeros in the others. */
INLINE void gather(int64_t depth, int64_t count, int full, matrix x, float *to) {
    if (x.along == 1 && count == full) {
        for (int64_t l = 0; l < depth; l++)
            memcpy(to + l * full, x.x + l * x.down, full * sizeof(float));
        return;
    }
    for (int64_t l = 0; l < depth; l += 16)
        for (int64_t j = 0; j < full; j++)
            for (int64_t i = l; i < least(l + 16, depth); i++)
                to[i * full + j] = j < count ? x.x[i * x.down + j * x.along] : 0;
}

/* A tile of `rows` and COLUMNS, of which `width` are there. */
INLINE void tile(int rows, int64_t depth, matrix a, const float *strip, beginning from, float *to,
                 int64_t down, int64_t width) {
    floats sums[ROWS][VECTORS];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < VECTORS; j++) sums[i][j] = (floats){0};
    for (int64_t l = 0; l < depth; l++) {
        floats line[VECTORS];
        UNROLLED for (int j = 0; j < VECTORS; j++)
            line[j] = *(const floats *)(strip + l * COLUMNS + 16 * j);
        UNROLLED for (int i = 0; i < rows; i++) {
            float factor = a.x[i * a.down + l * a.along];
            UNROLLED for (int j = 0; j < VECTORS; j++) sums[i][j] += factor * line[j];
        }
    }
    float edge[ROWS][COLUMNS];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < VECTORS; j++) {
            if (width < COLUMNS) {
                *(floats *)(edge[i] + 16 * j) = sums[i][j];
                continue;
            }
            if (from.bias) sums[i][j] += *(const floats *)(from.bias + 16 * j);
            if (from.added) sums[i][j] += *(const floats *)(from.added + i * from.down + 16 * j);
            *(floats *)(to + i * down + 16 * j) = sums[i][j];
        }
    if (width < COLUMNS)
        for (int i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j++)
                to[i * down + j] = edge[i][j] + (from.bias ? from.bias[j] : 0) +
                                   (from.added ? from.added[i * from.down + j] : 0);
}

#define TILES(COUNT)                                                                               \
    for (; rows >= COUNT; rows -= COUNT) {                                                         \
        tile(COUNT, depth, a, strip, from, to, down, width);                                       \
        a.x += COUNT * a.down;                                                                     \
        to += COUNT * down;                                                                        \
        if (from.added) from.added += COUNT * from.down;                                           \
    }

INLINE void down_a_strip(int64_t rows, int64_t depth, matrix a, const float *strip, beginning from,
                         float *to, int64_t down, int64_t width) {
    TILES(ROWS)
    if (ROWS > 8) TILES(8)
    TILES(4)
    TILES(1)
}

/* Floats that the product works in. */
int64_t scratch(int64_t n, int64_t k, int64_t threads) {
    return least(k, DEPTH) * (parts(n, COLUMNS) * COLUMNS + threads * (BLOCK + ROWS));
}

/* C (m, n) = A (m, k) B (k, n), + bias (n), + added (m, n) where they are there. C and `added` are
   contiguous; A is, or its transpose. work: scratch() floats. */
void product(int64_t m, int64_t n, int64_t k, int64_t threads, const float *a, int64_t a_down,
             int64_t a_along, const float *b, int64_t b_down, int64_t b_along, const float *bias,
             const float *added, float *c, float *work) {
    int64_t strips = parts(n, COLUMNS), blocks = parts(m, BLOCK), depth;
    if (blocks % threads) blocks = least(blocks + threads - blocks % threads, parts(m, ROWS));
    int64_t size = parts(m, blocks);
    int64_t groups = least(strips, parts(threads, blocks)); /* few rows: columns are shared out */
    int64_t wide = parts(strips, groups), units = blocks * groups;
    /* Lines so far apart take each other's place in the first cache: then A is gathered, too. */
    int apart = (a_along == 1 ? a_down : a_along) % 1024 == 0;
    float *gathered = work + least(k, DEPTH) * strips * COLUMNS;
    _Pragma("omp parallel num_threads((int)threads) if (threads > 1) private(depth)")
    for (int64_t first = 0; first < k; first += DEPTH) {
        depth = least(DEPTH, k - first);
        _Pragma("omp for schedule(static)")
        for (int64_t p = 0; p < strips; p++) {
            matrix some = {b + first * b_down + p * COLUMNS * b_along, b_down, b_along};
            gather(depth, least(COLUMNS, n - p * COLUMNS), COLUMNS, some, work + p * depth * COLUMNS);
        }
        _Pragma("omp for schedule(static, 1)")
        for (int64_t part = 0; part < threads; part++) {
            float *mine = gathered + part * depth * (BLOCK + ROWS);
            for (int64_t unit = part * units / threads; unit < (part + 1) * units / threads; unit++) {
                int64_t row = unit / groups * size, rows = least(size, m - row);
                const float *from = a + row * a_down + first * a_along;
                for (int64_t r = 0; apart && r < rows; r += ROWS) {
                    matrix some = {from + r * a_down, a_along, a_down};
                    gather(depth, least(ROWS, rows - r), ROWS, some, mine + r * depth);
                }
                int64_t end = least(strips, (unit % groups + 1) * wide);
                for (int64_t p = unit % groups * wide; p < end; p++) {
                    const float *strip = work + p * depth * COLUMNS;
                    int64_t column = p * COLUMNS, width = least(COLUMNS, n - column);
                    float *to = c + row * n + column;
                    beginning sum = {to, n, NULL}; /* of the depth before */
                    if (first == 0) {
                        sum.added = added ? added + row * n + column : NULL;
                        sum.bias = bias ? bias + column : NULL;
                    }
                    if (apart)
                        for (int64_t r = 0; r < rows; r += ROWS) {
                            down_a_strip(least(ROWS, rows - r), depth, (matrix){mine + r * depth, 1, ROWS},
                                     strip, sum, to + r * n, n, width);
                            if (sum.added) sum.added += ROWS * n;
                        }
                    else if (a_along == 1)
                        down_a_strip(rows, depth, (matrix){from, a_down, 1}, strip, sum, to, n, width);
                    else
                        down_a_strip(rows, depth, (matrix){from, 1, a_along}, strip, sum, to, n, width);
                }
            }
        }
    }
}
