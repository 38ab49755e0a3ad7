// Softmax statistics and gradients of rows of logits on CPU, each logit read once from memory.

#include "vector.h"

struct Rows {
  int64_t num_rows, width, is_bf16, threads;
  const void* logits;
  int64_t pitch;  // of the logits, in elements
  float *top, *total;  // maximum of z = logits * scale, and the sum of exp(z - maximum)
  const float *lse, *weight, *hit;
  const int64_t* column;
  void* grad;
  int64_t grad_pitch;
};

// Calls f(index, vector) for all of a row; what lies beyond the end is minus infinity.
template <class T, class F> static void each(const T* row, int64_t width, F f) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) f(i, load(row + i));
  if (i == width) return;
  v16 rest = splat(-INFINITY);
  T padded[16];
  store(padded, rest);
  memcpy(padded, row + i, (width - i) * sizeof(T));
  f(i, load(padded));
}

template <class T> static void statistics(const Rows& m, float scale, int64_t r) {
  const T* row = (const T*)m.logits + r * m.pitch;
  v16 top = splat(-INFINITY), total = {};
  each(row, m.width, [&](int64_t, v16 z) { top = larger(z, top); });
  const float most = largest(top) * scale;
  each(row, m.width, [&](int64_t, v16 z) {
    total += where_seen(z, exp16(z * scale - most));
  });
  m.top[r] = most;
  m.total[r] = sum(total);
}

// d logp / d logits = (onehot(column) - softmax) times what the row is worth
template <class T> static void gradient(const Rows& m, float scale, int64_t r) {
  const T* row = (const T*)m.logits + r * m.pitch;
  T* grad = (T*)m.grad + r * m.grad_pitch;
  const int64_t last = m.width / 16 * 16;
  each(row, m.width, [&](int64_t i, v16 z) {
    v16 g = -m.weight[r] * where_seen(z, exp16(z * scale - m.lse[r]));
    if (m.column[r] >= i && m.column[r] < i + 16) g[m.column[r] - i] += m.hit[r];
    if (i < last) {
      store(grad + i, g);
    } else {
      T padded[16];
      store(padded, g);
      memcpy(grad + i, padded, (m.width - i) * sizeof(T));
    }
  });
}

extern "C" {
void softmax_statistics(const Rows* m, float scale) {
#pragma omp parallel for num_threads(m->threads)
  for (int64_t r = 0; r < m->num_rows; r++)
    m->is_bf16 ? statistics<bf16>(*m, scale, r) : statistics<float>(*m, scale, r);
}

void softmax_gradient(const Rows* m, float scale) {
#pragma omp parallel for num_threads(m->threads)
  for (int64_t r = 0; r < m->num_rows; r++)
    m->is_bf16 ? gradient<bf16>(*m, scale, r) : gradient<float>(*m, scale, r);
}
}
