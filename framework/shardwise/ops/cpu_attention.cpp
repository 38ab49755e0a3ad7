// Attention and its gradients on CPU, for whole heads at once.
//
// Flash attention (Dao et al., 2022, algorithms 1 and 4) with a query block's scores kept whole:
// 32 queries against all keys that one of them sees fit the L2 cache, so nothing is rescaled. Keys
// come in panels of 32; a panel that no query of the block sees costs nothing, which is most of
// them for packed documents and for branches. Everything is fp32 inside.
//
// Letters: B sequences, T queries, S keys, H query heads, G key/value heads, K head width.

#include <memory>

#include "vector.h"

enum { ROWS = 32 };  // queries of a block, keys of a panel

// A tensor (B, heads, tokens, K): strides in elements, the last one 1.
struct View {
  void* data;
  int64_t b, h, t;
};

struct Problem {
  int64_t B, H, G, T, S, K, is_bf16, causal, threads;
  const uint8_t* mask;  // (B or 1, T, S), 1: sees; null: all, or the earlier ones with `causal`
  int64_t mask_b, mask_t;
  View q, k, v, out, grad, dq, dk, dv;
  float* lse;  // (B, H, T): log of the sum of exponentials; -inf where a query sees nothing
};

typedef float Tile[ROWS][32];
typedef std::unique_ptr<float[]> Floats;
static Floats floats(int64_t n) { return Floats(new float[n]); }

template <class T> static T* at(const View& x, int64_t b, int64_t h, int64_t t) {
  return (T*)x.data + b * x.b + h * x.h + t * x.t;
}

static inline int lesser(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// C (rows x width) += A (rows x depth) B (depth x width), or A^T of a stored (depth x rows) A.
// `width` is a multiple of 16, and of the parts of a tile or half of them.
template <bool TRANSPOSED, int PARTS>
static void accumulate_columns(const float* a, const float* b, int64_t ldb, float* c, int64_t ldc,
                               int depth) {
  for (int top = 0; top < ROWS; top += TILE_ROWS) {
    part acc[TILE_ROWS][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
      for (int j = 0; j < PARTS; j++) acc[r][j] = load_part(c + (top + r) * ldc + j * PART);
    for (int k = 0; k < depth; k++) {
      part y[PARTS];
      for (int j = 0; j < PARTS; j++) y[j] = load_part(b + k * ldb + j * PART);
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; r++) {
        part x = (TRANSPOSED ? a[k * 32 + top + r] : a[(top + r) * 32 + k]) - (part){};
        for (int j = 0; j < PARTS; j++) acc[r][j] += x * y[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
      for (int j = 0; j < PARTS; j++) *(part*)(c + (top + r) * ldc + j * PART) = acc[r][j];
  }
}

template <bool TRANSPOSED>
static void accumulate(const Tile& a, const float* b, float* c, int64_t width, int depth) {
  int64_t d = 0;
  for (; d + 2 * PART <= width; d += 2 * PART)
    accumulate_columns<TRANSPOSED, 2>(a[0], b + d, width, c + d, width, depth);
  if (d < width) accumulate_columns<TRANSPOSED, 1>(a[0], b + d, width, c + d, width, depth);
}

// The rows of one head as fp32, times `scale`, and zeros up to `padded`. They lie far apart, so the
// processor does not guess which come next: it is told.
template <class T>
static void rows_of(const View& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t padded,
                    int64_t width, float scale, float* to) {
  for (int64_t r = 0; r < padded; r++) {
    const T* row = at<T>(x, b, h, first + r);
    for (int64_t d = 0; d < width; d += 16) {
      __builtin_prefetch(row + 32 * x.t + d);
      store(to + r * width + d, r < n ? load(row + d) * scale : v16{});
    }
  }
}

template <class T>
static void put_rows(const View& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width,
                     const float* from) {
  for (int64_t r = 0; r < n; r++)
    for (int64_t d = 0; d < width; d += 16)
      store(at<T>(x, b, h, first + r) + d, load(from + r * width + d));
}

// Rows (padded x width) as panels of 32 rows, packed by depth, as `block` reads them.
static void panels_of(const float* rows, int64_t padded, int64_t width, float* to) {
  for (int64_t p = 0; p < padded; p += 32)
    for (int64_t d = 0; d < width; d++)
      for (int64_t r = 0; r < 32; r++) to[p * width + d * 32 + r] = rows[(p + r) * width + d];
}

// Which panels a block of queries sees: found once, for all heads.
struct Seen {
  int64_t blocks, panels;
  std::unique_ptr<uint8_t[]> any;

  explicit Seen(const Problem& m)
      : blocks((m.T + ROWS - 1) / ROWS), panels((m.S + 31) / 32) {
    const int64_t batch = m.mask && m.mask_b ? m.B : 1;
    any.reset(new uint8_t[batch * blocks * panels]);
#pragma omp parallel for num_threads(m.threads) collapse(2)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = 0; i < blocks; i++)
        for (int64_t j = 0; j < panels; j++)
          any[(b * blocks + i) * panels + j] = sees(m, b, i * ROWS, j * 32);
  }

  static bool sees(const Problem& m, int64_t b, int64_t t, int64_t s) {
    static const uint8_t none[32] = {};
    const int n = lesser(ROWS, m.T - t), width = lesser(32, m.S - s);
    if (m.causal && s > t + n - 1) return false;
    for (int r = 0; r < n && m.mask; r++)
      if (memcmp(m.mask + b * m.mask_b + (t + r) * m.mask_t + s, none, width)) return true;
    return !m.mask;
  }

  // The first keys of the panels that queries from t see; returns how many.
  int64_t operator()(const Problem& m, int64_t b, int64_t t, int64_t* firsts) const {
    const uint8_t* row = any.get() + ((m.mask && m.mask_b ? b : 0) * blocks + t / ROWS) * panels;
    int64_t count = 0;
    for (int64_t j = 0; j < panels; j++)
      if (row[j]) firsts[count++] = j * 32;
    return count;
  }
};

// Minus infinity where a query (of n from t) does not see a key (from s).
static void hide(const Problem& m, int64_t b, int64_t t, int64_t n, int64_t s, Tile& z) {
  if (s + 32 > m.S)
    for (int r = 0; r < ROWS; r++)
      for (int64_t j = m.S - s; j < 32; j++) z[r][j] = -INFINITY;
  if (m.causal && s + 31 > t)
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = t + r + 1 > s ? t + r + 1 - s : 0; j < 32; j++) z[r][j] = -INFINITY;
  for (int64_t r = 0; r < n && m.mask; r++) {
    const uint8_t* row = m.mask + b * m.mask_b + (t + r) * m.mask_t + s;
    for (int64_t j = 0; j < lesser(32, m.S - s); j++) z[r][j] = row[j] ? z[r][j] : -INFINITY;
  }
}

// exp(z - shift), and 0 where z is minus infinity, whatever the shift is; NaN stays NaN.
static inline v16 weight(v16 z, float shift) {
  return where_seen(z, exp16(z - shift));
}

template <class T>
static void forward_head(const Problem& m, const Seen& seen, int64_t b, int64_t h) {
  const int64_t K = m.K, padded = (m.S + 31) / 32 * 32, g = h / (m.H / m.G);
  Floats value = floats(padded * K), key = floats(padded * K), q = floats(ROWS * K);
  Floats out = floats(ROWS * K), scores = floats(padded * 32);
  std::unique_ptr<int64_t[]> panels(new int64_t[padded / 32]);
  rows_of<T>(m.k, b, g, 0, m.S, padded, K, 1.0f, value.get());
  panels_of(value.get(), padded, K, key.get());
  rows_of<T>(m.v, b, g, 0, m.S, padded, K, 1.0f, value.get());
  Tile* tiles = (Tile*)scores.get();
  for (int64_t t = 0; t < m.T; t += ROWS) {
    const int n = lesser(ROWS, m.T - t);
    const int64_t count = seen(m, b, t, panels.get());
    rows_of<T>(m.q, b, h, t, n, ROWS, K, 1.0f / sqrtf((float)K), q.get());
    v16 top[ROWS];
    for (int r = 0; r < ROWS; r++) top[r] = splat(-INFINITY);
    for (int64_t i = 0; i < count; i++) {
      block(q.get(), K, ROWS, K, key.get() + panels[i] * K, tiles[i]);
      hide(m, b, t, n, panels[i], tiles[i]);
      for (int r = 0; r < n; r++) {
        v16 low = load(tiles[i][r]), high = load(tiles[i][r] + 16);
        low = larger(low, high);
        top[r] = larger(low, top[r]);
      }
    }
    float total[ROWS];
    for (int r = 0; r < n; r++) {
      const float most = largest(top[r]);
      v16 all = {};
      for (int64_t i = 0; i < count; i++)
        for (int half = 0; half < 32; half += 16) {
          float* z = tiles[i][r] + half;
          v16 p = weight(load(z), most);
          all += p;
          store(z, p);
        }
      total[r] = sum(all);
      m.lse[(b * m.H + h) * m.T + t + r] = most + logf(total[r]);
    }
    memset(out.get(), 0, ROWS * K * sizeof(float));
    for (int64_t i = 0; i < count; i++)
      accumulate<false>(tiles[i], value.get() + panels[i] * K, out.get(), K, 32);
    for (int r = 0; r < n; r++)
      for (int64_t d = 0; d < K; d += 16) {
        float* o = out.get() + r * K + d;
        store(o, total[r] == 0 ? v16{} : load(o) / total[r]);
      }
    put_rows<T>(m.out, b, h, t, n, K, out.get());
  }
}

// All query heads of a key/value head.
template <class T>
static void backward_group(const Problem& m, const Seen& seen, int64_t b, int64_t g) {
  const int64_t K = m.K, padded = (m.S + 31) / 32 * 32, group = m.H / m.G;
  const float scale = 1.0f / sqrtf((float)K);
  Floats key = floats(padded * K), keys = floats(padded * K), values = floats(padded * K);
  Floats dk(new float[padded * K]()), dv(new float[padded * K]());
  Floats q = floats(ROWS * K), grad = floats(ROWS * K), out = floats(ROWS * K);
  std::unique_ptr<int64_t[]> panels(new int64_t[padded / 32]);
  rows_of<T>(m.v, b, g, 0, m.S, padded, K, 1.0f, key.get());
  panels_of(key.get(), padded, K, values.get());
  rows_of<T>(m.k, b, g, 0, m.S, padded, K, 1.0f, key.get());
  panels_of(key.get(), padded, K, keys.get());
  Tile p, ds;
  for (int64_t h = g * group; h < (g + 1) * group; h++)
    for (int64_t t = 0; t < m.T; t += ROWS) {
      const int n = lesser(ROWS, m.T - t);
      const int64_t count = seen(m, b, t, panels.get());
      rows_of<T>(m.q, b, h, t, n, ROWS, K, scale, q.get());
      rows_of<T>(m.grad, b, h, t, n, ROWS, K, 1.0f, grad.get());
      rows_of<T>(m.out, b, h, t, n, ROWS, K, 1.0f, out.get());
      float mean[ROWS], lse[ROWS];
      for (int r = 0; r < ROWS; r++) {
        v16 dot = {};
        for (int64_t d = 0; d < K; d += 16)
          dot += load(grad.get() + r * K + d) * load(out.get() + r * K + d);
        mean[r] = sum(dot);
        lse[r] = r < n ? m.lse[(b * m.H + h) * m.T + t + r] : 0.0f;
      }
      float* dq = out.get();  // the outputs have been read
      memset(dq, 0, ROWS * K * sizeof(float));
      for (int64_t i = 0; i < count; i++) {
        const int64_t s = panels[i];
        block(q.get(), K, ROWS, K, keys.get() + s * K, p);
        hide(m, b, t, n, s, p);
        block(grad.get(), K, ROWS, K, values.get() + s * K, ds);
        for (int r = 0; r < ROWS; r++)
          for (int half = 0; half < 32; half += 16) {
            v16 w = weight(load(p[r] + half), lse[r]);
            store(p[r] + half, w);
            store(ds[r] + half, w * (load(ds[r] + half) - mean[r]));
          }
        accumulate<true>(p, grad.get(), dv.get() + s * K, K, ROWS);
        accumulate<true>(ds, q.get(), dk.get() + s * K, K, ROWS);
        accumulate<false>(ds, key.get() + s * K, dq, K, 32);
      }
      for (int64_t d = 0; d < ROWS * K; d += 16) store(dq + d, load(dq + d) * scale);
      put_rows<T>(m.dq, b, h, t, n, K, dq);
    }
  put_rows<T>(m.dk, b, g, 0, m.S, K, dk.get());
  put_rows<T>(m.dv, b, g, 0, m.S, K, dv.get());
}

extern "C" {
void attention_forward(const Problem* m) {
  const Seen seen(*m);
#pragma omp parallel for num_threads(m->threads) schedule(dynamic)
  for (int64_t i = 0; i < m->B * m->H; i++) {
    if (m->is_bf16)
      forward_head<bf16>(*m, seen, i / m->H, i % m->H);
    else
      forward_head<float>(*m, seen, i / m->H, i % m->H);
  }
}

void attention_backward(const Problem* m) {
  const Seen seen(*m);
#pragma omp parallel for num_threads(m->threads) schedule(dynamic)
  for (int64_t i = 0; i < m->B * m->G; i++) {
    if (m->is_bf16)
      backward_group<bf16>(*m, seen, i / m->G, i % m->G);
    else
      backward_group<float>(*m, seen, i / m->G, i % m->G);
  }
}
}
