// One forward pass of a decoder-only transformer over a few tokens on CPU, with a KV cache: all
// layers in one parallel region.
//
// A row is a token with its sequence and its position. Decoding has one row a sequence, a prefill
// one row a prompt token; both are the same computation, and no row's result depends on which other
// rows are there. Keys and values lie in pages of 16 positions, anywhere in the cache: a sequence
// has a table of its pages. Decoding is bound by reading the weights once, so they are packed in
// the order in which they are read (packing.py), and nothing leaves this file between layers. bf16
// is multiplied by AMX tiles or AVX512-BF16 where they are, else as fp32, which uses the compiler's
// vector type, on any machine. Values are rounded to the storage type T where the plain PyTorch
// model rounds them; sums are fp32. Weights that bf16 holds exactly are packed so for fp32 too: that
// is half as much to read.
//
// Letters: n rows, D model width, H query heads, G key/value heads, K head width, F feed-forward
// width, V vocabulary. A "panel" is 32 outputs of a linear layer.

#include <memory>

#include "../ops/vector.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

enum { MAX_HEAD_DIM = 256 };

static inline v16 silu(v16 x) { return x / (1.0f + exp16(-x)); }
static inline v16 gelu_tanh(v16 x) {
  v16 y = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp16(-2.0f * y));  // 0.5 (1 + tanh y) = sigmoid(2 y)
}

// C = A W^T in bf16; see `block` of vector.h.
#ifdef __AMX_BF16__
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static inline void block(const bf16* a, int64_t lda, int rows, int64_t depth, const bf16* w,
                         float (*c)[32]) {
  _tile_zero(0);
  _tile_zero(1);
  if (rows <= 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      // The hardware stops at each page; asking 4 KiB ahead is worth a sixth of the time.
      for (int i = 0; i < 1024; i += 32) __builtin_prefetch(w + k * 32 + 2048 + i);
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(6, w + k * 32, 64);
      _tile_loadd(7, w + k * 32 + 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  } else {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(5, a + 16 * lda + k, lda * 2);
      _tile_loadd(6, w + k * 32, 64);
      _tile_loadd(7, w + k * 32 + 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, c[16], 128);
    _tile_stored(3, c[16] + 16, 128);
  }
  _tile_stored(0, c[0], 128);
  _tile_stored(1, c[0] + 16, 128);
}
static void tiles_on() {
  TileConfig config;
  _tile_loadconfig(&config);
}
static void tiles_off() { _tile_release(); }
#else
#ifdef __AVX512BF16__
// The panel is packed as for AMX: by 32 of depth, two halves of 16 pairs of 16 outputs.
static inline void block(const bf16* a, int64_t lda, int rows, int64_t depth, const bf16* w,
                         float (*c)[32]) {
  for (int top = 0; top < rows; top += TILE_ROWS) {
    __m512 acc[TILE_ROWS][2] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      const bf16* pair = w + k / 32 * 1024 + k % 32 * 16;
      __m512bh w0 = (__m512bh)_mm512_loadu_si512(pair);
      __m512bh w1 = (__m512bh)_mm512_loadu_si512(pair + 512);
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; r++) {
        int32_t two;
        memcpy(&two, a + (top + r) * lda + k, sizeof two);
        __m512bh x = (__m512bh)_mm512_set1_epi32(two);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, w0);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, w1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++) {
      _mm512_storeu_ps(c[top + r], acc[r][0]);
      _mm512_storeu_ps(c[top + r] + 16, acc[r][1]);
    }
  }
}
#endif
static void tiles_on() {}
static void tiles_off() {}
#endif

// This thread's share of the panels of a linear layer; `finish(row, output, low, high)` gets the
// sums of outputs [output, output + 16) and the 16 after them.
template <class A, class W, class Finish>
static void multiply(int64_t n, const A* a, int64_t depth, const W* w, int64_t out, Finish finish) {
  int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), panels = (out + 31) / 32;
  float c[32][32] __attribute__((aligned(64)));
  for (int64_t p = panels * me / threads; p < panels * (me + 1) / threads; p++)
    for (int64_t top = 0; top < n; top += 32) {
      int rows = n - top < 32 ? (int)(n - top) : 32;
      block(a + top * depth, depth, rows, depth, w + p * 32 * depth, c);
      for (int r = 0; r < rows; r++) finish(top + r, p * 32, load(c[r]), load(c[r] + 16));
    }
}

// The same for weights of either type.
template <class Finish>
static void linear(int64_t n, const float* a, int64_t depth, const void* w, bool narrow,
                   int64_t out, Finish finish) {
  if (narrow)
    multiply(n, a, depth, (const bf16*)w, out, finish);
  else
    multiply(n, a, depth, (const float*)w, out, finish);
}
template <class Finish>
static void linear(int64_t n, const bf16* a, int64_t depth, const void* w, bool, int64_t out,
                   Finish finish) {
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  multiply(n, a, depth, (const bf16*)w, out, finish);
#else
  std::unique_ptr<float[]> wide(new float[n * depth]);  // depth is a multiple of 32
  for (int64_t i = 0; i < n * depth; i += 16) store(wide.get() + i, load(a + i));
  multiply(n, wide.get(), depth, (const bf16*)w, out, finish);
#endif
}

static inline v16 bias_at(const float* b, int64_t i) { return b ? load(b + i) : v16{}; }

template <class T>
static void norm(const T* x, T* y, const float* weight, const float* bias, int64_t width,
                 float eps, bool rms) {
  v16 total = {}, squares = {};
  float mean = 0;
  if (!rms) {
    for (int64_t i = 0; i < width; i += 16) total += load(x + i);
    mean = sum(total) / width;
  }
  for (int64_t i = 0; i < width; i += 16) {
    v16 d = load(x + i) - mean;
    squares += d * d;
  }
  float scale = 1.0f / sqrtf(sum(squares) / width + eps);
  for (int64_t i = 0; i < width; i += 16)
    store(y + i, (load(x + i) - mean) * scale * load(weight + i) + bias_at(bias, i));
}

template <class T>
static void rotate(T* x, const float* cosine, const float* sine, int64_t width) {
  for (int64_t i = 0; i < width / 2; i += 16) {
    v16 a = load(x + i), b = load(x + width / 2 + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, a * c - b * s);
    store(x + width / 2 + i, b * c + a * s);
  }
}

struct Layer {
  const float *norm1, *norm1_bias;
  const void* qkv;
  const float *qkv_bias, *q_norm, *k_norm;
  const void* o;
  const float *o_bias, *norm2, *norm2_bias;
  const void* up;
  const float* up_bias;
  const void* down;
  const float* down_bias;
  void *keys, *values;  // caches (G, pages, K, 16) and (G, pages, 16, K)
  int64_t window;       // 0: none
};

struct Model {
  int64_t layers, D, H, G, K, F, V;
  int64_t capacity;  // positions in all pages
  int64_t longest;   // positions in the longest table, at most
  int64_t rms, gated;
  const Layer* layer;
  const float *norm, *norm_bias;
  const void* head;
  void *qkv, *attended, *hidden;  // shared buffers of `rows` rows
  void* scratch;                  // one (rows, D) buffer a thread
  float* scores;                  // 4 * longest of them a thread
  int64_t rows;                   // a multiple of 32, at least n
  int64_t narrow;                 // whether weights are in bf16
};

// One row's place in the query-key-value buffer and in the caches, for key/value head g.
template <class T> struct Place {
  T *q, *k, *v, *keys, *values;
  const int64_t* table;
  Place(const Model& m, const Layer& l, int64_t row, int64_t g, const int64_t* pages) {
    q = (T*)m.qkv + row * (((m.H + 2 * m.G) * m.K + 31) / 32 * 32);
    k = q + (m.H + g) * m.K;
    v = k + m.G * m.K;
    q += g * (m.H / m.G) * m.K;
    keys = (T*)l.keys + g * m.K * m.capacity;
    values = (T*)l.values + g * m.K * m.capacity;
    table = pages;
  }
};

// Norms and rotates a row's queries and key of head g; puts its key and value into the cache.
template <class T>
static void remember(const Model& m, const Layer& l, const Place<T>& at, int64_t position,
                     const float* cosine, const float* sine, float eps) {
  const float* none = nullptr;
  for (int64_t h = 0; h < m.H / m.G; h++) {
    if (l.q_norm) norm(at.q + h * m.K, at.q + h * m.K, l.q_norm, none, m.K, eps, true);
    if (cosine) rotate(at.q + h * m.K, cosine, sine, m.K);
  }
  if (l.k_norm) norm(at.k, at.k, l.k_norm, none, m.K, eps, true);
  if (cosine) rotate(at.k, cosine, sine, m.K);
  const int64_t page = at.table[position / 16] * 16 * m.K;
  T* column = at.keys + page + position % 16;
  for (int64_t d = 0; d < m.K; d++) column[d * 16] = at.k[d];
  memcpy(at.values + page + position % 16 * m.K, at.v, m.K * sizeof(T));
}

// NUM query heads that share a key/value head attend to positions [start, end) of the cache.
template <int NUM, class T>
static void attend(const Model& m, const Place<T>& at, const T* q, int64_t start, int64_t end,
                   T* out, float* scores) {
  const int64_t K = m.K, cap = m.longest;
  const float scale = 1.0f / sqrtf((float)K);
  float query[NUM][MAX_HEAD_DIM];
  v16 top[NUM];
  for (int h = 0; h < NUM; h++) {
    top[h] = splat(-INFINITY);
    for (int64_t d = 0; d < K; d += 16) store(query[h] + d, load(q + h * K + d) * scale);
  }
  // Positions are taken by pages, those out of sight masked. Pages lie anywhere: what comes next is
  // fetched meanwhile, the keys of the next page and, at last, the values of this one.
  const int64_t begin = start / 16 * 16;
  for (int64_t i = begin; i < end; i += 16) {
    const T* keys = at.keys + at.table[i / 16] * 16 * K;
    const T* later = at.keys + at.table[(i + 16 < end ? i + 16 : begin) / 16] * 16 * K;
    for (int left = 0; left < 16; left += PART) {
      const T* next = left + PART < 16 ? later : at.values + at.table[i / 16] * 16 * K;
      part acc[NUM][2] = {};  // two chains of sums hide the latency of a fused multiply-add
      for (int64_t d = 0; d < K; d += 2) {
        const T* key = keys + d * 16 + left;
        __builtin_prefetch(next + d * 16, 0, 2);
        __builtin_prefetch(next + d * 16 + 16, 0, 2);
        part even = load_part(key), odd = load_part(key + 16);
        for (int h = 0; h < NUM; h++) {
          acc[h][0] += query[h][d] * even;
          acc[h][1] += query[h][d + 1] * odd;
        }
      }
      for (int h = 0; h < NUM; h++) *(part*)(scores + h * cap + i + left) = acc[h][0] + acc[h][1];
    }
    for (int h = 0; h < NUM; h++) {
      float* s = scores + h * cap + i;
      for (int64_t j = i; j < start; j++) s[j - i] = -INFINITY;
      for (int64_t j = end; j < i + 16; j++) s[j - i] = -INFINITY;
      v16 z = load(s);
      top[h] = larger(z, top[h]);
    }
  }
  float inverse[NUM];
  for (int h = 0; h < NUM; h++) {
    const float most = largest(top[h]);
    v16 total = {};
    for (int64_t i = begin; i < end; i += 16) {
      v16 z = load(scores + h * cap + i), p = where_seen(z, exp16(z - most));
      total += p;
      store(scores + h * cap + i, p);
    }
    inverse[h] = 1.0f / sum(total);
  }
  for (int64_t d = 0; d < K; d += 2 * PART) {
    part acc[NUM][2] = {};
    for (int64_t i = start; i < end;) {
      const T* value = at.values + (at.table[i / 16] * 16 + i % 16) * K + d;
      const int64_t last = i / 16 * 16 + 16 < end ? i / 16 * 16 + 16 : end;
      for (; i < last; i++, value += K) {
        part low = load_part(value), high = load_part(value + PART);
        for (int h = 0; h < NUM; h++) {
          float p = scores[h * cap + i];
          acc[h][0] += p * low;
          acc[h][1] += p * high;
        }
      }
    }
    for (int h = 0; h < NUM; h++)
      for (int j = 0; j < 2; j++) *(part*)(query[h] + d + j * PART) = acc[h][j] * inverse[h];
  }
  for (int h = 0; h < NUM; h++)
    for (int64_t d = 0; d < K; d += 16) store(out + h * K + d, load(query[h] + d));
}

// All query heads of one key/value head, up to four at a time.
template <class T>
static void attend_group(const Model& m, const Layer& l, const Place<T>& at, int64_t position,
                         T* out, float* scores) {
  const int64_t end = position + 1, start = l.window && end > l.window ? end - l.window : 0;
  const int64_t group = m.H / m.G;
  for (int64_t h = 0; h < group; h += 4) {
    const T* q = at.q + h * m.K;
    T* o = out + h * m.K;
    switch (group - h) {
      case 1: attend<1>(m, at, q, start, end, o, scores); break;
      case 2: attend<2>(m, at, q, start, end, o, scores); break;
      case 3: attend<3>(m, at, q, start, end, o, scores); break;
      default: attend<4>(m, at, q, start, end, o, scores);
    }
  }
}

template <class T>
static void forward(const Model& m, int64_t n, T* x, const int64_t* sequences,
                    const int64_t* positions, const int64_t* tables, int64_t table_width,
                    const float* cosine, const float* sine, float eps,
                    int64_t num_wanted, const int64_t* wanted, float* logits, int threads) {
  const int64_t D = m.D, HK = m.H * m.K, width = (m.H + 2 * m.G) * m.K;
  const int64_t pitch = (width + 31) / 32 * 32;
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    T* normed = (T*)m.scratch + me * m.rows * D;
    float* scores = m.scores + me * 4 * m.longest;
    if (sizeof(T) == 2) tiles_on();
    auto norm_rows = [&](const float* weight, const float* bias) {
      for (int64_t r = 0; r < n; r++)
        norm(x + r * D, normed + r * D, weight, bias, D, eps, m.rms != 0);
    };
    for (int64_t i = 0; i < m.layers; i++) {
      const Layer& l = m.layer[i];
      auto keep = [&](T* out, int64_t pitch, const float* bias) {
        return [=](int64_t r, int64_t o, v16 low, v16 high) {
          store(out + r * pitch + o, low + bias_at(bias, o));
          store(out + r * pitch + o + 16, high + bias_at(bias, o + 16));
        };
      };
      auto add = [&](const float* bias) {
        return [=](int64_t r, int64_t o, v16 low, v16 high) {
          T* p = x + r * D + o;
          store(p, load(p) + rounded<T>(low + bias_at(bias, o)));
          store(p + 16, load(p + 16) + rounded<T>(high + bias_at(bias, o + 16)));
        };
      };
      norm_rows(l.norm1, l.norm1_bias);
      linear(n, normed, D, l.qkv, m.narrow, width, keep((T*)m.qkv, pitch, l.qkv_bias));
#pragma omp barrier
      const int64_t half = m.K / 2, group = m.H / m.G;
      for (int64_t task = me; task < n * m.G; task += team) {
        const int64_t row = task / m.G, at = row * half;
        const int64_t* table = tables + sequences[row] * table_width;
        remember(m, l, Place<T>(m, l, row, task % m.G, table), positions[row],
                 cosine ? cosine + at : cosine, sine ? sine + at : sine, eps);
      }
#pragma omp barrier
      for (int64_t task = me; task < n * m.G; task += team) {
        const int64_t row = task / m.G, g = task % m.G;
        const int64_t* table = tables + sequences[row] * table_width;
        attend_group(m, l, Place<T>(m, l, row, g, table), positions[row],
               (T*)m.attended + row * HK + g * group * m.K, scores);
      }
#pragma omp barrier
      linear(n, (const T*)m.attended, HK, l.o, m.narrow, D, add(l.o_bias));
#pragma omp barrier
      norm_rows(l.norm2, l.norm2_bias);
      T* hidden = (T*)m.hidden;
      if (m.gated) {  // a panel holds 16 gates, then their 16 factors
        linear(n, normed, D, l.up, m.narrow, 2 * m.F, [&](int64_t r, int64_t o, v16 g, v16 u) {
          v16 gate = rounded<T>(silu(rounded<T>(g)));
          store(hidden + r * m.F + o / 2, gate * rounded<T>(u));
        });
      } else {
        linear(n, normed, D, l.up, m.narrow, m.F, [&](int64_t r, int64_t o, v16 low, v16 high) {
          T* p = hidden + r * m.F + o;
          store(p, gelu_tanh(rounded<T>(low + bias_at(l.up_bias, o))));
          store(p + 16, gelu_tanh(rounded<T>(high + bias_at(l.up_bias, o + 16))));
        });
      }
#pragma omp barrier
      linear(n, (const T*)hidden, m.F, l.down, m.narrow, D, add(l.down_bias));
#pragma omp barrier
    }
    const int64_t vocab = (m.V + 31) / 32 * 32;
    for (int64_t r = 0; r < num_wanted; r++)
      norm(x + wanted[r] * D, normed + r * D, m.norm, m.norm_bias, D, eps, m.rms != 0);
    auto tell = [&](int64_t r, int64_t o, v16 low, v16 high) {
      store(logits + r * vocab + o, low);
      store(logits + r * vocab + o + 16, high);
    };
    linear(num_wanted, normed, D, m.head, m.narrow, m.V, tell);
    if (sizeof(T) == 2) tiles_off();
  }
}

extern "C" {
int64_t bf16_unit() {  // what multiplies bf16: 0 nothing, 1 AVX512-BF16, 2 AMX
#if defined(__AMX_BF16__)
  return 2;
#elif defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

void forward(const Model* m, int64_t is_bf16, int64_t n, void* x, const int64_t* sequences,
             const int64_t* positions, const int64_t* tables, int64_t table_width,
             const float* cosine, const float* sine, float eps,
             int64_t num_wanted, const int64_t* wanted, float* logits, int threads) {
  if (is_bf16)
    forward<bf16>(*m, n, (bf16*)x, sequences, positions, tables, table_width, cosine, sine, eps,
                  num_wanted, wanted, logits, threads);
  else
    forward<float>(*m, n, (float*)x, sequences, positions, tables, table_width, cosine, sine, eps,
                   num_wanted, wanted, logits, threads);
}
}
