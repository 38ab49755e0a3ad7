// What the C++ kernels for CPUs share: vectors by the compiler's own type, on any machine, and one
// product that keeps its sums in registers.

#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
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

// A tile of sums must fit the registers, beside what is multiplied: of AVX-512 8 rows of 32
// outputs, else (16 registers of half the width) 4 rows of 16, or 6 where the rows need not come
// out even, or 5 where weights are widened. A multiplication takes 4 cycles, in which a core begins
// 8 of them.
#ifdef __AVX512F__
enum { TILE_ROWS = 8, BLOCK_ROWS = 8, NARROW_ROWS = 8, TILE_PARTS = 2, PART = 16 };
#else
enum { TILE_ROWS = 4, BLOCK_ROWS = 6, NARROW_ROWS = 5, TILE_PARTS = 2, PART = 8 };
#endif
typedef float part __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef int32_t ipart __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef uint32_t upart __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef uint16_t hpart __attribute__((vector_size(2 * PART), aligned(2), may_alias));
static inline part load_part(const float* p) { return *(const part*)p; }
static inline part load_part(const bf16* p) {
  return (part)(__builtin_convertvector(*(const hpart*)p, upart) << 16);
}

// A choice between wider vectors than the machine's, `x > y ? x : y`, GCC makes number by number,
// where two instructions would do. So choices are made by parts.
template <class F> static inline v16 by_part(F f, v16 x, v16 y) {
  v16 out;
  for (int i = 0; i < 16 / PART; i++) ((part*)&out)[i] = f(((part*)&x)[i], ((part*)&y)[i]);
  return out;
}
static inline v16 larger(v16 x, v16 y) {
  return by_part([](part a, part b) { return a > b ? a : b; }, x, y);
}
// y, but 0 where x is -inf.
static inline v16 where_seen(v16 x, v16 y) {
  return by_part([](part a, part b) { return a == -INFINITY ? part{} : b; }, x, y);
}

// exp by 2^round(x log2 e) times a polynomial; relative error below 2e-7 within the clamp, and 0
// below it.
static inline part exp_part(part x) {
  const part least = (part){} - 87.0f, most = (part){} + 88.0f, half = (part){} + 0.5f;
  const ipart tiny = x < least;
  x = x > most ? most : x;
  x = tiny ? least : x;
  part t = x * 1.44269504f;
  ipart k = __builtin_convertvector(t + (t < 0.0f ? -half : half), ipart);
  part kf = __builtin_convertvector(k, part);
  part r = x - kf * 0.693359375f + kf * 2.12194440e-4f;
  part p = (part){} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return tiny ? part{} : p * (part)((k + 127) << 23);
}
static inline v16 exp16(v16 x) {
  return by_part([](part a, part) { return exp_part(a); }, x, x);
}

// Sums of ROWS rows by PARTS parts of a panel, which go on from c unless `fresh`. With FETCH, what
// stands from `next` is fetched meanwhile, `stride` bytes for each of depth.
template <int ROWS, int PARTS, bool FETCH>
static inline void tile(const float* a, int64_t lda, int64_t depth, const float* w, float (*c)[32],
                        bool fresh, const char* next, int64_t stride) {
  part acc[ROWS][PARTS];
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < PARTS; j++) acc[r][j] = fresh ? part{} : load_part(c[r] + j * PART);
  for (int64_t k = 0; k < depth; k++) {
    if (FETCH) __builtin_prefetch(next + k * stride, 0, 2);
    part y[PARTS];
    for (int j = 0; j < PARTS; j++) y[j] = load_part(w + k * 32 + j * PART);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      part x = a[r * lda + k] - (part){};
#pragma GCC unroll 4
      for (int j = 0; j < PARTS; j++) acc[r][j] += x * y[j];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < PARTS; j++) *(part*)(c[r] + j * PART) = acc[r][j];
}

// The same for weights in bf16, which are widened in registers. They are packed by 32 of depth: two
// halves of 16 pairs of 16 outputs.
template <int ROWS, int PARTS, bool FETCH>
static inline void tile(const float* a, int64_t lda, int64_t depth, const bf16* w, float (*c)[32],
                        bool fresh, const char* next, int64_t stride) {
  part acc[ROWS][PARTS];
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < PARTS; j++) acc[r][j] = fresh ? part{} : load_part(c[r] + j * PART);
  for (int64_t k = 0; k < depth; k += 2) {
    const uint32_t* pairs = (const uint32_t*)(w + k / 32 * 1024 + k % 32 * 16);
    if (FETCH) __builtin_prefetch(next + k * stride, 0, 2);
    for (int odd = 0; odd < 2; odd++) {
      part y[PARTS];
      for (int j = 0; j < PARTS; j++) {
        const upart two = *(const upart*)(pairs + j * PART / 16 * 256 + j * PART % 16);
        y[j] = (part)(odd ? two & 0xffff0000 : two << 16);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        part x = a[r * lda + k + odd] - (part){};
#pragma GCC unroll 4
        for (int j = 0; j < PARTS; j++) acc[r][j] += x * y[j];
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < PARTS; j++) *(part*)(c[r] + j * PART) = acc[r][j];
}

// `tile` for up to MOST rows, all of the panel; returns where fetching has come to. One or two rows
// of fp32 take all parts: so many sums in flight hide the latency of a fused multiply-add, and what
// is read in the order of memory the machine fetches by itself, faster than when it is told to.
template <int MOST, class W>
static inline const char* tiles(const float* a, int64_t lda, int rows, int64_t depth, const W* w,
                                float (*c)[32], bool fresh, const char* next, int64_t bytes) {
  if constexpr (MOST > 1) {
    if (rows < MOST)
      return tiles<MOST - 1>(a, lda, rows, depth, w, c, fresh, next, bytes);
  }
  constexpr bool FEW = MOST <= 2 && sizeof(W) == 4;
  constexpr int PARTS = FEW ? 32 / PART : TILE_PARTS, TURNS = 32 / PART / PARTS;
  constexpr int64_t HALF = sizeof(W) == 2 ? 512 : 16;  // from 16 outputs to the next
  for (int i = 0; i < TURNS; i++, next += depth * (bytes / TURNS))
    tile<MOST, PARTS, !FEW>(a, lda, depth, w + i * HALF, (float(*)[32])(c[0] + i * 16), fresh, next,
                            bytes / TURNS);
  return next;
}

// C = A W^T for up to 32 rows of A and a panel: 32 outputs of W, packed by depth.
//
// Panels are read from memory once, and multiplying and reading each take long: so the memory
// behind the panel is fetched evenly while this one is multiplied. Depth is taken by as much as
// stays in the L1 cache with the rows. Each sum runs in the order of depth, so that no row's
// result depends on how many there are.
template <class W>
static inline void block(const float* a, int64_t lda, int rows, int64_t depth, const W* w,
                         float (*c)[32]) {
  const int64_t DEPTH = 96, AHEAD = 32768;
  constexpr int MOST = sizeof(W) == 2 ? NARROW_ROWS : BLOCK_ROWS;
  const int turns = (rows + MOST - 1) / MOST;
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const char* next = (const char*)(w + k * 32) + AHEAD;
    const int64_t some = depth - k < DEPTH ? depth - k : DEPTH;
    for (int i = 0, top = 0; i < turns; i++) {
      const int few = (rows - top + turns - i - 1) / (turns - i);
      next = tiles<MOST>(a + top * lda + k, lda, few, some, w + k * 32, c + top, k == 0, next,
                               32 * sizeof(W) / turns);
      top += few;
    }
  }
}
