// What the C++ kernels for CPUs share: vectors by the compiler's own type, on any machine, and one
// product that keeps its sums in registers.

#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t bf16;

static inline v16 load(const float* p) { return *(const v16*)p; }
static inline v16 load(const bf16* p) {
  return (v16)(__builtin_convertvector(*(const h16*)p, u16) << 16);
}
static inline void store(float* p, v16 x) { *(v16*)p = x; }
static inline void store(bf16* p, v16 x) {  // round to nearest even
  u16 u = (u16)x;
  *(h16*)p = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, h16);
}
template <class T> static inline v16 rounded(v16 x) {
  T t[16];
  store(t, x);
  return load(t);
}
static inline v16 splat(float x) { return x - (v16){}; }  // x - 0 is x; x + 0 costs an add
static inline float sum(v16 x) {
  float s = 0;
  for (int i = 0; i < 16; i++) s += x[i];
  return s;
}
static inline float largest(v16 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
}

// exp by 2^round(x log2 e) times a polynomial; relative error below 2e-7 within the clamp, and 0
// below it.
static inline v16 exp16(v16 x) {
  const i16 tiny = x < -87.0f;
  x = x > 88.0f ? splat(88.0f) : x;
  x = tiny ? splat(-87.0f) : x;
  v16 t = x * 1.44269504f;
  i16 k = __builtin_convertvector(t + (t < 0.0f ? splat(-0.5f) : splat(0.5f)), i16);
  v16 kf = __builtin_convertvector(k, v16);
  v16 r = x - kf * 0.693359375f + kf * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return tiny ? splat(0.0f) : p * (v16)((k + 127) << 23);
}

// A tile of sums must fit the registers, beside what is multiplied: of AVX-512 8 rows of 32
// outputs, else (16 registers of half the width) 4 rows of 16.
#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_PARTS = 2, PART = 16 };
#else
enum { TILE_ROWS = 4, TILE_PARTS = 2, PART = 8 };
#endif
typedef float part __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef uint32_t upart __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef uint16_t hpart __attribute__((vector_size(2 * PART), aligned(2), may_alias));
static inline part load_part(const float* p) { return *(const part*)p; }
static inline part load_part(const bf16* p) {
  return (part)(__builtin_convertvector(*(const hpart*)p, upart) << 16);
}

// C = A W^T for up to 32 rows of A (read by whole tiles) and a panel: 32 outputs of W, packed by
// depth.
static inline void block(const float* a, int64_t lda, int rows, int64_t depth, const float* w,
                         float (*c)[32]) {
  for (int top = 0; top < rows; top += TILE_ROWS)
    for (int left = 0; left < 32; left += TILE_PARTS * PART) {
      part acc[TILE_ROWS][TILE_PARTS] = {};
      for (int64_t k = 0; k < depth; k++) {
        const part* y = (const part*)(w + k * 32 + left);
        part w0 = y[0], w1 = y[1];
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++) {
          part x = a[(top + r) * lda + k] - (part){};
          acc[r][0] += x * w0;
          acc[r][1] += x * w1;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; r++) {
        part* z = (part*)(c[top + r] + left);
        z[0] = acc[r][0];
        z[1] = acc[r][1];
      }
    }
}
