/* Sixteen numbers at a time, on any processor: what the C sources share. */

#ifndef NATIVE_VECTORS
#define NATIVE_VECTORS

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")
typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
/* As many as a register holds: what sums stay in while a loop runs. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));

/* e^x within 2 units in the last place: Cody and Waite's reduction, a polynomial of degree 6. */
INLINE floats exponential(floats x) {
    const floats magic = (floats){0} + 12582912.0f, zero = {0};
    ints low = x < -87.0f, high = x > 88.0f;
    x = (floats)(((ints)x & ~low) | ((ints)(zero - 87.0f) & low));
    x = (floats)(((ints)x & ~high) | ((ints)(zero + 88.0f) & high));
    floats n = x * 1.44269504f + magic;
    ints power = ((ints)n - (ints)magic + 127) << 23;
    n -= magic;
    floats r = x - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    floats y = (floats){0} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return y * (floats)power; /* what is not a number stays so */
}

#endif
