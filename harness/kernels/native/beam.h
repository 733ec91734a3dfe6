// The beam search of additive codebooks for one row after another; included once for each level of features.
// Products and sums are those of the torch code in harness.core.solvers.additive_fit, in the same order.
#pragma once

constexpr int64_t kTagged = 256;  // scores that one reduction compares
constexpr float kTaken = 3.402823466e+38f;

using F = float __attribute__((vector_size(4 * kLanes)));  // kLanes: values of a register, which the level defines
using I = int32_t __attribute__((vector_size(4 * kLanes)));

ALWAYS_INLINE F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
ALWAYS_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
ALWAYS_INLINE F broadcast(float x) { return F{} + x; }

// `tile` vectors of scores: a product of eight terms, then the norm.
template <class V, int tile>
ALWAYS_INLINE void tile_of_scores(const float* target, const float* norms, const float* table, int64_t entries,
                                  float* scores) {
  F sums[tile] = {};
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const F x = broadcast(target[k]);
#pragma GCC unroll 16
    for (int j = 0; j < tile; ++j) sums[j] = V::fma(x, load(table + k * entries + kLanes * j), sums[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < tile; ++j) store(scores + kLanes * j, sums[j] + load(norms + kLanes * j));
}

template <class V>
void score(const float* target, const float* norms, const float* table, int64_t entries, float* scores) {
  int64_t i = 0;
  for (; i + kLanes * V::tile <= entries; i += kLanes * V::tile)
    tile_of_scores<V, V::tile>(target, norms + i, table + i, entries, scores + i);
  for (; i < entries; i += kLanes) tile_of_scores<V, 1>(target, norms + i, table + i, entries, scores + i);
}

// Scores of four targets (4, 8) together: each part of the table is loaded once.
template <class V>
void score_four(const float* targets, const float* norms, const float* table, int64_t entries, float* scores) {
  constexpr int part = V::tile < 4 ? 1 : V::tile / 4;
  for (int64_t i = 0; i < entries; i += kLanes * part) {
    F sums[4][part] = {};
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < part; ++j) {
        const F column = load(table + k * entries + i + kLanes * j);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) sums[p][j] = V::fma(broadcast(targets[8 * p + k]), column, sums[p][j]);
      }
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < part; ++j)
        store(scores + p * entries + i + kLanes * j, sums[p][j] + load(norms + i + kLanes * j));
  }
}

// The smallest of `count` values, 64 or a multiple; four minima, so that none waits for the one before.
template <class V>
ALWAYS_INLINE float smallest(const float* values, int64_t count) {
  F least[4];
  for (int j = 0; j < 4; ++j) least[j] = load(values + kLanes * j);
  for (int64_t i = 4 * kLanes; i < count; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) least[j] = V::smaller(least[j], load(values + i + kLanes * j));
  return V::smallest(V::smaller(V::smaller(least[0], least[1]), V::smaller(least[2], least[3])));
}

// The place among 256 replaces the last bits of each score, see `kmeans.smallest`.
ALWAYS_INLINE void tag(float* scores, int64_t count) {
  I first;
  for (int i = 0; i < kLanes; ++i) first[i] = i;
  for (int64_t i = 0; i < count; i += kLanes)
    store(scores + i, (F)(((I)load(scores + i) & -256) | (first + static_cast<int32_t>(i % kTagged))));
}

// The candidates of one row: targets, gaps and codes, and the scores of all their entries.
struct Candidates {
  int64_t count;
  float *targets, *gaps, *scores, *least;
  int64_t *codes, *next, *picked;
};

// Indices of the smallest of the scores of all candidates, in ascending order: `number` of them, in `picked`.
template <class V>
void pick(const Candidates& c, int64_t total, int64_t number) {
  const int64_t blocks = total / kTagged;
  tag(c.scores, total);
  for (int64_t b = 0; b < blocks; ++b) c.least[b] = smallest<V>(c.scores + b * kTagged, kTagged);
  for (int64_t i = 0; i < number; ++i) {
    int64_t best = 0;
    for (int64_t b = 1; b < blocks; ++b) best = c.least[b] < c.least[best] ? b : best;
    int32_t bits;
    __builtin_memcpy(&bits, &c.least[best], sizeof bits);
    c.picked[i] = best * kTagged + (bits & 255);
    if (i + 1 == number) break;
    c.scores[c.picked[i]] = kTaken;
    c.least[best] = smallest<V>(c.scores + best * kTagged, kTagged);
  }
}

// Targets and scores of all candidates for codebook m.
template <class V>
void aim(const Search& s, const Candidates& c, int64_t m) {
  for (int64_t p = 0; p < c.count; ++p) {
    const float* vector = s.vectors + (m * s.entries + c.codes[p * s.books + m]) * 8;
    float* target = c.targets + 8 * p;
    for (int k = 0; k < 8; ++k) target[k] = c.gaps[8 * p + k] + vector[k];
  }
  const float *norms = s.norms + m * s.entries, *table = s.tables + 8 * m * s.entries;
  int64_t p = 0;
  for (; p + 4 <= c.count; p += 4) score_four<V>(c.targets + 8 * p, norms, table, s.entries, c.scores + p * s.entries);
  for (; p < c.count; ++p) score<V>(c.targets + 8 * p, norms, table, s.entries, c.scores + p * s.entries);
}

// Replaces the candidates by the best `number` of all their entries in codebook m.
template <class V>
void widen(const Search& s, Candidates& c, int64_t m, int64_t number) {
  for (int64_t p = 0; c.count > 1 && p < c.count; ++p) {
    const F length = broadcast(squared_length(c.targets + 8 * p));
    for (float* x = c.scores + p * s.entries; x < c.scores + (p + 1) * s.entries; x += kLanes)
      store(x, load(x) + length);
  }
  pick<V>(c, c.count * s.entries, number);
  for (int64_t i = 0; i < number; ++i) {
    const int64_t p = c.picked[i] / s.entries, code = c.picked[i] % s.entries;
    const float* vector = s.vectors + (m * s.entries + code) * 8;
    for (int k = 0; k < 8; ++k) c.gaps[8 * i + k] = c.targets[8 * p + k] - vector[k];
    for (int64_t b = 0; b < s.books; ++b) c.next[i * s.books + b] = b == m ? code : c.codes[p * s.books + b];
  }
  int64_t* codes = c.codes;
  c.codes = c.next, c.next = codes, c.count = number;
}

// Keeps the candidate that is nearest to an entry of the last codebook.
template <class V>
void narrow(const Search& s, Candidates& c) {
  if (c.count == 1) return;
  int64_t best = 0;
  float least = 0;
  for (int64_t p = 0; p < c.count; ++p) {
    const float distance = smallest<V>(c.scores + p * s.entries, s.entries) + squared_length(c.targets + 8 * p);
    if (p == 0 || distance < least) best = p, least = distance;
  }
  c.targets += 8 * best, c.scores += best * s.entries, c.codes += best * s.books;
  c.count = 1;
}

template <class V>
void search(const Search& s, const SearchedRows& rows, int64_t first, int64_t last, float* floats, int64_t* integers) {
  for (int64_t r = first; r < last; ++r) {
    float *gaps = floats + 8 * s.beam, *scores = gaps + 8 * s.beam;
    int64_t* next = integers + s.beam * s.books;
    Candidates c{1, floats, gaps, scores, scores + s.beam * s.entries, integers, next, next + s.beam * s.books};
    __builtin_memcpy(gaps, rows.gaps + 8 * r, 8 * sizeof(float));
    for (int64_t m = 0; m < s.books; ++m) c.codes[m] = rows.codes[m * rows.stride + r];
    for (int64_t m = 0; m < s.books; ++m) {
      aim<V>(s, c, m);
      const bool end = m + 1 == s.books;
      if (end) narrow<V>(s, c);
      widen<V>(s, c, m, end ? 1 : min(s.beam, c.count * s.entries));
    }
    __builtin_memcpy(rows.remaining + 8 * r, c.gaps, 8 * sizeof(float));
    for (int64_t m = 0; m < s.books; ++m) rows.chosen[m * rows.chosen_stride + r] = c.codes[m];
  }
}
