/* Products of matrices in float32 on the CPU. Called by native_product.py.

   Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": B stands in strips
   of as many columns as fit in registers, a slice of its depth at a time; a tile of the result is
   summed in registers. Each number is summed in the order of its depth, however many threads. */

#include <stdint.h>
#include <string.h>

#include "native_vectors.h"

#if LANES == 16
#define TILE_ROWS 12 /* with two registers across, what 32 of them hold; else 16 */
#else
#define TILE_ROWS 6
#endif
#define TILE_VECTORS 2
#define TILE_WIDTH (LANES * TILE_VECTORS)
#define DEPTH 512 /* a strip of it, and the rows against it, stay in the second cache */
#define BLOCK 96  /* rows that one thread takes at once, about */

/* Numbers at x, `down` apart from row to row and `along` from column to column. */
typedef struct { const float *x; int64_t down, along; } matrix;
/* What a tile begins with: zeros, or what stands in `added` (rows `down` apart) and `bias`. */
typedef struct { const float *added; int64_t down; const float *bias; } beginning;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

#if LANES == 16
#ifdef __clang__
INLINE floats PICKED(floats a, floats b, ints from) {
    floats y;
    for (int i = 0; i < 16; i++) y[i] = from[i] < 16 ? a[from[i] & 15] : b[from[i] & 15];
    return y;
}
#else
#define PICKED(A, B, FROM) __builtin_shuffle(A, B, FROM)
#endif

/* Sixteen lines of sixteen, across. */
INLINE void across(floats *lines) {
    const ints here = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    UNROLLED for (int step = 8; step > 0; step /= 2) {
        ints odd = (here & step) != 0; /* of two lanes that change places, the second */
        ints low = (odd & (here + 16 - step)) | (~odd & here);
        ints high = (odd & (here + 16)) | (~odd & (here + step));
        UNROLLED for (int i = 0; i < 16; i++) {
            if (i & step) continue;
            floats a = lines[i], b = lines[i + step];
            lines[i] = PICKED(a, b, low);
            lines[i + step] = PICKED(a, b, high);
        }
    }
}
#endif

/* `count` lines (the columns of x) of `depth` numbers, to (depth, full); zeros in the others. */
INLINE void gather(int64_t depth, int64_t count, int full, matrix x, float *to) {
    if (x.along == 1 && count == full) {
        for (int64_t l = 0; l < depth; l++)
            memcpy(to + l * full, x.x + l * x.down, full * sizeof(float));
        return;
    }
    for (int64_t l = 0; l < depth; l += 16)
        for (int64_t j = 0; j < full; j += 16) {
#if LANES == 16
            if (x.down == 1 && depth - l >= 16 && count - j >= 16 && full - j >= 16) {
                floats lines[16];
                UNROLLED for (int i = 0; i < 16; i++)
                    lines[i] = *(const floats *)(x.x + l + (j + i) * x.along);
                across(lines);
                UNROLLED for (int i = 0; i < 16; i++) *(floats *)(to + (l + i) * full + j) = lines[i];
                continue;
            }
#endif
            for (int64_t a = j; a < least(j + 16, full); a++)
                for (int64_t i = l; i < least(l + 16, depth); i++)
                    to[i * full + a] = a < count ? x.x[i * x.down + a * x.along] : 0;
        }
}

/* Strip p of B (depth, n). */
static void gather_strip(int64_t depth, int64_t n, int64_t p, matrix b, float *to) {
    b.x += p * TILE_WIDTH * b.along;
    gather(depth, least(TILE_WIDTH, n - p * TILE_WIDTH), TILE_WIDTH, b, to);
}

/* A tile of `rows` and TILE_WIDTH, of which `width` are there. */
INLINE void tile(int rows, int64_t depth, matrix a, const float *strip, beginning from, float *to,
                 int64_t down, int64_t width) {
    lanes sums[TILE_ROWS][TILE_VECTORS];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] = (lanes){0};
    for (int64_t l = 0; l < depth; l++) {
        lanes line[TILE_VECTORS];
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++)
            line[j] = *(const lanes *)(strip + l * TILE_WIDTH + LANES * j);
        UNROLLED for (int i = 0; i < rows; i++) {
            float factor = a.x[i * a.down + l * a.along];
            UNROLLED for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] += factor * line[j];
        }
    }
    float edge[TILE_ROWS][TILE_WIDTH];
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++) {
            if (width < TILE_WIDTH) {
                *(lanes *)(edge[i] + LANES * j) = sums[i][j];
                continue;
            }
            if (from.bias) sums[i][j] += *(const lanes *)(from.bias + LANES * j);
            if (from.added) sums[i][j] += *(const lanes *)(from.added + i * from.down + LANES * j);
            *(lanes *)(to + i * down + LANES * j) = sums[i][j];
        }
    if (width < TILE_WIDTH)
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
    TILES(TILE_ROWS)
    if (TILE_ROWS > 8) TILES(8)
    TILES(4)
    TILES(1)
}

/* Rows of C against the strips begin to end-1 of B, which stand `apart` floats from each other;
   `from` and `to` at column 0; room: (BLOCK + TILE_ROWS) depth floats. */
static void rows_by_strips(int64_t rows, int64_t n, int64_t depth, matrix a, const float *strips,
                           int64_t apart, int64_t begin, int64_t end, beginning from, float *to,
                           int64_t down, float *room) {
    /* Lines so far apart take each other's place in the first cache: then A is gathered, too. */
    int collide = (a.along == 1 ? a.down : a.along) % 1024 == 0;
    for (int64_t r = 0; collide && r < rows; r += TILE_ROWS) {
        matrix some = {a.x + r * a.down, a.along, a.down};
        gather(depth, least(TILE_ROWS, rows - r), TILE_ROWS, some, room + r * depth);
    }
    for (int64_t p = begin; p < end; p++) {
        const float *strip = strips + p * apart;
        int64_t column = p * TILE_WIDTH, width = least(TILE_WIDTH, n - column);
        float *c = to + column;
        beginning sum = {from.added ? from.added + column : NULL, from.down,
                         from.bias ? from.bias + column : NULL};
        if (collide)
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                matrix some = {room + r * depth, 1, TILE_ROWS};
                down_a_strip(least(TILE_ROWS, rows - r), depth, some, strip, sum, c + r * down, down,
                             width);
                if (sum.added) sum.added += TILE_ROWS * sum.down;
            }
        else if (a.along == 1)
            down_a_strip(rows, depth, (matrix){a.x, a.down, 1}, strip, sum, c, down, width);
        else
            down_a_strip(rows, depth, (matrix){a.x, 1, a.along}, strip, sum, c, down, width);
    }
}

/* Floats that the product works in. */
int64_t product_room(int64_t n, int64_t k, int64_t threads) {
    return least(k, DEPTH) * (parts(n, TILE_WIDTH) * TILE_WIDTH + threads * (BLOCK + TILE_ROWS));
}

/* C (m, n) = A (m, k) B (k, n), + bias (n) where there is one. C is contiguous; A or its transpose
   is. room: product_room() floats. */
void product(int64_t m, int64_t n, int64_t k, int64_t threads, const float *a, int64_t a_down,
             int64_t a_along, const float *b, int64_t b_down, int64_t b_along, const float *bias,
             float *c, float *room) {
    int64_t strips = parts(n, TILE_WIDTH), blocks = parts(m, BLOCK);
    if (blocks % threads) blocks = least(blocks + threads - blocks % threads, parts(m, TILE_ROWS));
    int64_t size = parts(m, blocks);
    int64_t groups = least(strips, parts(threads, blocks)); /* few rows: columns are shared out */
    int64_t wide = parts(strips, groups), units = blocks * groups;
    float *rooms = room + least(k, DEPTH) * strips * TILE_WIDTH;
    _Pragma("omp parallel num_threads((int)threads) if (threads > 1)")
    for (int64_t first = 0; first < k; first += DEPTH) {
        int64_t depth = least(DEPTH, k - first);
        _Pragma("omp for schedule(static)")
        for (int64_t p = 0; p < strips; p++) {
            matrix some = {b + first * b_down, b_down, b_along};
            gather_strip(depth, n, p, some, room + p * depth * TILE_WIDTH);
        }
        _Pragma("omp for schedule(static, 1)")
        for (int64_t part = 0; part < threads; part++)
            for (int64_t unit = part * units / threads; unit < (part + 1) * units / threads; unit++) {
                int64_t row = unit / groups * size, begin = unit % groups * wide;
                matrix some = {a + row * a_down + first * a_along, a_down, a_along};
                beginning from = {c + row * n, n, NULL}; /* the depth before */
                if (first == 0) from = (beginning){NULL, n, bias};
                rows_by_strips(least(size, m - row), n, depth, some, room, depth * TILE_WIDTH, begin,
                               least(strips, begin + wide), from, c + row * n, n,
                               rooms + part * depth * (BLOCK + TILE_ROWS));
            }
    }
}
