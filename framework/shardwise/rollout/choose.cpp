// Which token comes next: of rows of logits, on CPU.
//
// A row is decided by its own logits and its own number in (0, 1); sums are taken in the order of
// the vocabulary, or by parts of it that depend on the row alone.

#include <float.h>

#include <algorithm>
#include <memory>

#include "../ops/vector.h"

// The greedy choice, or the first token whose cumulated probability reaches u; and its log-prob.
static void choose(const float* z, int64_t vocab, float inverse_temperature, bool greedy, double u,
                   int64_t* token, float* logprob) {
  const int64_t CHUNK = 512, whole = vocab / 16 * 16;
  float top = -INFINITY;
  v16 tops = splat(top);
  for (int64_t i = 0; i < whole; i += 16)
    tops = larger(load(z + i), tops);
  for (int i = 0; i < 16; i++) top = tops[i] > top ? tops[i] : top;
  for (int64_t i = whole; i < vocab; i++) top = z[i] > top ? z[i] : top;
  auto weight = [&](int64_t i) {  // of 16 tokens from i; 0 beyond the vocabulary
    v16 x;
    if (i + 16 <= vocab) return exp16((load(z + i) - top) * inverse_temperature);
    for (int j = 0; j < 16; j++) x[j] = i + j < vocab ? z[i + j] - top : -INFINITY;
    return where_seen(x, exp16(x * inverse_temperature));
  };
  auto chunk_weight = [&](int64_t begin) {
    v16 part = {};
    for (int64_t i = begin; i < begin + CHUNK && i < vocab; i += 16) part += weight(i);
    return (double)sum(part);
  };
  double total = 0;
  for (int64_t i = 0; i < vocab; i += CHUNK) total += chunk_weight(i);
  int64_t pick = -1;
  if (greedy) {
    for (pick = 0; pick < vocab - 1 && z[pick] != top;) pick++;
  } else {
    double left = u * total;
    int64_t begin = 0;
    for (; begin + CHUNK < vocab; begin += CHUNK) {
      double part = chunk_weight(begin);
      if (left <= part) break;
      left -= part;
    }
    for (int64_t i = begin; i < vocab; i += 16) {
      v16 e = weight(i);
      for (int j = 0; j < 16 && i + j < vocab; j++) {
        if (e[j] > 0) pick = i + j;  // rounding may leave a rest: the last possible token
        left -= e[j];
        if (left <= 0 && pick >= 0) { i = vocab; break; }
      }
    }
  }
  pick = pick < 0 ? 0 : pick;  // all logits are NaN: the log-probability says so
  *token = pick;
  *logprob = (z[pick] - top) * inverse_temperature - (float)log(total);
}

// A token of a row that is cut: higher values first, of equal ones the lower id.
static inline uint64_t ranked(float y, int64_t id) {
  uint32_t bits;
  y += 0.0f;  // -0 is 0
  memcpy(&bits, &y, sizeof bits);
  bits = bits >> 31 ? bits : ~bits & 0x7fffffff;  // ascending where y descends
  return (uint64_t)bits << 32 | (uint32_t)id;
}

// The first of `count` ranked tokens whose weights reach `mass`: how many, put in front.
static int64_t nucleus(uint64_t* ranks, int64_t count, const float* weight, double mass) {
  int64_t begin = 0, end = count;  // fewer than `begin` do not reach it, `end` are enough
  auto of = [&](int64_t i) { return (double)weight[(uint32_t)ranks[i]]; };
  while (end - begin > 32) {
    const int64_t middle = (begin + end) / 2;
    std::nth_element(ranks + begin, ranks + middle, ranks + end);
    double half = 0;
    for (int64_t i = begin; i < middle; i++) half += of(i);
    if (half >= mass) {
      end = middle;
    } else {
      begin = middle;
      mass -= half;
    }
  }
  std::sort(ranks + begin, ranks + end);
  for (; begin < end && mass > 0; begin++) mass -= of(begin);
  return begin;
}

struct Cut {
  float* y;         // of all tokens: logits over the temperature
  float* weight;    // exp(y - its maximum)
  uint64_t* ranks;  // room for all tokens
};

// A token of those that top-k, then top-p left, which are the `kept` ones, ascending: how many.
static int64_t choose_cut(const float* z, int64_t vocab, float temperature, int64_t top_k,
                          double top_p, double u, const Cut& row, int64_t* token, float* logprob,
                          float* behavior, int32_t* kept) {
  const float FAR = 8;  // behind the first, in nats: most that come later are never looked at
  float top = -INFINITY;
  for (int64_t i = 0; i < vocab; i++) {
    row.y[i] = z[i] / temperature;
    top = row.y[i] > top ? row.y[i] : top;
  }
  int64_t near = 0;
  double total = 0, near_total = 0;
  for (int64_t i = 0; i < vocab; i += 16) {
    v16 x = splat(-INFINITY);
    memcpy(&x, row.y + i, (vocab - i < 16 ? vocab - i : 16) * sizeof(float));
    const v16 e = where_seen(x, exp16(x - top));
    memcpy(row.weight + i, &e, (vocab - i < 16 ? vocab - i : 16) * sizeof(float));
    for (int64_t j = i; j < vocab && j < i + 16; j++) {
      const bool in = row.y[j] >= top - FAR;
      near += in;
      near_total += in ? row.weight[j] : 0;
      total += row.weight[j];
    }
  }
  *token = 0;
  *logprob = *behavior = NAN;
  if (!(total > 0)) return 0;  // some logits are NaN, or none is a number
  const bool enough = top_k ? near >= top_k : near_total >= top_p * total;
  int64_t count = 0;
  const float least = enough ? top - FAR : -FLT_MAX;  // what is -inf is never kept
  for (int64_t i = 0; i < vocab; i++)
    if (row.y[i] >= least) row.ranks[count++] = ranked(row.y[i], i);
  double mass = total;
  if (top_k && top_k < count) {
    std::nth_element(row.ranks, row.ranks + top_k, row.ranks + count);
    count = top_k;
  }
  if (top_k) {
    mass = 0;
    for (int64_t i = 0; i < count; i++) mass += row.weight[(uint32_t)row.ranks[i]];
  }
  if (top_p < 1) count = nucleus(row.ranks, count, row.weight, top_p * mass);
  for (int64_t i = 0; i < count; i++) kept[i] = (int32_t)(uint32_t)row.ranks[i];
  std::sort(kept, kept + count);
  double left = 0;
  for (int64_t i = 0; i < count; i++) left += row.weight[kept[i]];
  const double rest = left;
  left *= u;
  for (int64_t i = 0; i < count; i++) {
    *token = kept[i];
    left -= row.weight[kept[i]];
    if (left <= 0) break;
  }
  const float above = row.y[*token] - top;
  *logprob = above - (float)log(total);
  *behavior = above - (float)log(rest);
  return count;
}

extern "C" {
void choose_tokens(const float* logits, int64_t n, int64_t vocab, int64_t pitch,
                   float inverse_temperature, int64_t greedy, const double* u, int64_t* tokens,
                   float* logprobs, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n; r++)
    choose(logits + r * pitch, vocab, inverse_temperature, greedy != 0, u[r], tokens + r,
           logprobs + r);
}

// `kept` has a row of `vocab` for each row, of which `counts` are written.
void choose_cut_tokens(const float* logits, int64_t n, int64_t vocab, int64_t pitch,
                       float temperature, int64_t top_k, double top_p, const double* u,
                       int64_t* tokens, float* logprobs, float* behaviors, int32_t* kept,
                       int64_t* counts, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> numbers(new float[2 * vocab]);
    std::unique_ptr<uint64_t[]> ranks(new uint64_t[vocab]);
    const Cut row = {numbers.get(), numbers.get() + vocab, ranks.get()};
#pragma omp for
    for (int64_t r = 0; r < n; r++)
      counts[r] = choose_cut(logits + r * pitch, vocab, temperature, top_k, top_p, u[r], row,
                             tokens + r, logprobs + r, behaviors + r, kept + r * vocab);
  }
}
}
