// The torch operator that finds the nearest E8P points: the search of harness.core.formats.lattice, one vector after
// another. Products of matrices are torch's own, and all other sums have the order of torch's, so bits are the same.
#pragma GCC optimize("fp-contract=off")
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"

namespace ptqbench {
namespace {

using at::Tensor;

constexpr int kWidth = 8;
constexpr float kShift = 0.25f, kNorm = 6;  // half of the squared norm of the incomplete patterns
constexpr int64_t kGrain = 128;             // vectors that are searched on one thread, at least

// The patterns, see `lattice._multisets` and `lattice._incomplete`.
struct Patterns {
  int64_t kinds, count;
  const float *steps, *parity, *points;  // (kinds, 8), (kinds, 1), (count, 8)
  const int64_t* halves;                 // (count, 3)
};

// One vector, shifted by - 1/4 or + 1/4: magnitudes, the signs as bits, and whether their number is odd.
struct Shifted {
  float magnitude[kWidth], square = 0;
  uint32_t negative = 0;
  bool odd = false;

  // Column `column` of vectors (8, n): the first n columns are shifted by - 1/4, the others by + 1/4.
  Shifted(const float* vectors, int64_t n, int64_t column) {
    for (int k = 0; k < kWidth; ++k) {
      const float x = column < n ? vectors[k * n + column] - kShift : vectors[k * n + column - n] + kShift;
      magnitude[k] = std::fabs(x);
      square = k ? square + x * x : x * x;
      negative |= static_cast<uint32_t>(x < 0) << k;
    }
    odd = __builtin_popcount(negative) & 1;
  }
};

// The best pattern so far of one shifted vector.
struct Best {
  float score;
  uint8_t order[kWidth];  // coordinates by descending magnitude
  uint8_t kind;           // of the complete pattern
  int8_t incomplete = -1;
  uint8_t change;  // the coordinate whose sign changes if the parity requires it
};

// Descending, equal magnitudes in the order of their coordinates: a network of 19 exchanges without branches, whose
// keys are the bits of a magnitude, then its coordinate.
void sort(const float* magnitude, float* ordered, uint8_t* order) {
  static constexpr uint8_t kPairs[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                                            {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                                            {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
  uint64_t keys[kWidth];
  for (int k = 0; k < kWidth; ++k) {
    uint32_t bits;
    std::memcpy(&bits, magnitude + k, sizeof bits);
    keys[k] = static_cast<uint64_t>(bits) << 3 | static_cast<uint64_t>(kWidth - 1 - k);
  }
#pragma GCC unroll 19
  for (const auto& pair : kPairs) {
    const uint64_t a = keys[pair[0]], b = keys[pair[1]];
    keys[pair[0]] = a > b ? a : b, keys[pair[1]] = a > b ? b : a;
  }
  for (int k = 0; k < kWidth; ++k) {
    order[k] = static_cast<uint8_t>(kWidth - 1 - (keys[k] & 7));
    ordered[k] = magnitude[order[k]];
  }
}

float sum(const float* values, int64_t stride, int first, int last) {
  float total = values[first * stride];
  for (int k = first + 1; k < last; ++k) total += values[k * stride];
  return total;
}

// The best complete pattern of column c, by the products of steps and ordered magnitudes.
// Returns: whether the bound on incomplete patterns is higher.
bool best_complete(const Patterns& p, const float* ordered, const float* products, int64_t columns, int64_t c, bool odd,
                   Best& best) {
  const float half = sum(ordered + c, columns, 0, kWidth) / 2, last = ordered[(kWidth - 1) * columns + c];
  for (int64_t k = 0; k < p.kinds; ++k) {
    const float score = products[k * columns + c] + (half - (odd == (p.parity[k] == 1) ? 0.0f : last));
    if (k == 0 || score > best.score) best.score = score, best.kind = static_cast<uint8_t>(k);
  }
  best.change = best.order[kWidth - 1];
  const float bound = sum(ordered + c, columns, 0, 5) * 1.5f + sum(ordered + c, columns, 5, kWidth) / 2 - kNorm;
  return bound > best.score;
}

// Replaces the best pattern by an incomplete one where that has a higher score; column i of `count` of products.
void try_incomplete(const Patterns& p, const Shifted& x, const float* products, int64_t columns, int64_t i,
                    Best& best) {
  float highest = 0;
  int64_t place = 0;
  const float least = 3 * x.magnitude[best.order[kWidth - 1]];
  for (int64_t k = 0; k < p.count; ++k) {
    const int64_t* halves = p.halves + 3 * k;
    float cost = least;
    for (int h = 0; h < 3; ++h) cost = std::min(cost, x.magnitude[halves[h]]);
    const float score = products[k * columns + i] - kNorm - (x.odd ? 0.0f : cost);
    if (k == 0 || score > highest) highest = score, place = k;
  }
  if (!(highest > best.score)) return;
  best.score = highest, best.incomplete = static_cast<int8_t>(place), best.change = 0;
  const float* pattern = p.points + kWidth * place;
  for (int k = 1; k < kWidth; ++k)
    if (pattern[k] * x.magnitude[k] < pattern[best.change] * x.magnitude[best.change])
      best.change = static_cast<uint8_t>(k);
}

// The point of a shifted vector, without the shift.
void point_of(const Patterns& p, const Shifted& x, const Best& best, float* point) {
  float total = 0;
  for (int k = 0; k < kWidth; ++k) {
    const int at = best.incomplete < 0 ? best.order[k] : k;
    point[at] = best.incomplete < 0 ? p.steps[kWidth * best.kind + k] + 0.5f : p.points[kWidth * best.incomplete + k];
    total += point[at];
  }
  const bool changes = x.odd != (std::fmod(total, 2.0f) == 1);
  for (int k = 0; k < kWidth; ++k)
    if (((x.negative >> k & 1) != 0) != (changes && k == best.change)) point[k] = -point[k];
}

Patterns patterns_of(const Tensor& steps, const Tensor& parity, const Tensor& points, const Tensor& halves) {
  const int64_t kinds = steps.size(0), count = points.size(0);
  return {kinds,
          count,
          values_in<float>(steps, {kinds, kWidth}, "steps"),
          values_in<float>(parity, {kinds, 1}, "parity"),
          values_in<float>(points, {count, kWidth}, "points"),
          values_in<int64_t>(halves, {count, 3}, "halves")};
}

// Calls use(i) for each i below `count`, shared among the threads.
template <class Use>
void each(int64_t count, Use&& use) {
  at::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) use(i);
  });
}

// The magnitudes (8, 2 n) of all shifted vectors in descending order, which `best` gets.
Tensor sorted(const float* vectors, int64_t n, std::vector<Best>& best) {
  const Tensor all = at::empty({kWidth, 2 * n});
  float* out = all.mutable_data_ptr<float>();
  each(2 * n, [&](int64_t c) {
    float ordered[kWidth];
    sort(Shifted(vectors, n, c).magnitude, ordered, best[c].order);
    for (int k = 0; k < kWidth; ++k) out[k * 2 * n + c] = ordered[k];
  });
  return all;
}

// The columns in which incomplete patterns may be better, after the best complete pattern of each is found.
std::vector<int64_t> find_complete(const Patterns& p, const float* vectors, int64_t n, const Tensor& ordered,
                                   const Tensor& products, std::vector<Best>& best) {
  std::vector<uint8_t> higher(2 * n);
  const float *o = ordered.const_data_ptr<float>(), *scores = products.const_data_ptr<float>();
  each(2 * n,
       [&](int64_t c) { higher[c] = best_complete(p, o, scores, 2 * n, c, Shifted(vectors, n, c).odd, best[c]); });
  std::vector<int64_t> columns;
  for (int64_t c = 0; c < 2 * n; ++c)
    if (higher[c]) columns.push_back(c);
  return columns;
}

// The magnitudes (8, count) of some columns.
Tensor magnitudes(const float* vectors, int64_t n, const std::vector<int64_t>& columns) {
  const int64_t count = static_cast<int64_t>(columns.size());
  const Tensor all = at::empty({kWidth, count});
  float* out = all.mutable_data_ptr<float>();
  each(count, [&](int64_t i) {
    const Shifted x(vectors, n, columns[i]);
    for (int k = 0; k < kWidth; ++k) out[k * count + i] = x.magnitude[k];
  });
  return all;
}

// The points nearest to vectors (8, n) float32.
Tensor nearest(const Tensor& vectors, const Tensor& steps, const Tensor& offset, const Tensor& parity,
               const Tensor& points, const Tensor& halves) {
  const Patterns p = patterns_of(steps, parity, points, halves);
  const Tensor input = vectors.contiguous(), output = at::empty_like(input);
  const int64_t n = input.size(-1);
  const float* v = values_in<float>(input, {kWidth, n}, "vectors");
  std::vector<Best> best(2 * n);
  const Tensor ordered = sorted(v, n, best);
  const std::vector<int64_t> few = find_complete(p, v, n, ordered, at::addmm(offset, steps, ordered), best);
  const Tensor incomplete = at::mm(points, magnitudes(v, n, few));
  const int64_t count = incomplete.size(1);
  const float* scores = incomplete.const_data_ptr<float>();
  each(count, [&](int64_t i) { try_incomplete(p, Shifted(v, n, few[i]), scores, count, i, best[few[i]]); });
  float* out = output.mutable_data_ptr<float>();
  each(n, [&](int64_t c) {
    const Shifted down(v, n, c), up(v, n, c + n);
    const bool minus = up.square - 2 * best[c + n].score < down.square - 2 * best[c].score;
    float point[kWidth];
    point_of(p, minus ? up : down, best[minus ? c + n : c], point);
    for (int k = 0; k < kWidth; ++k) out[k * n + c] = point[k] + (minus ? -kShift : kShift);
  });
  return output;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def(
      "e8p_nearest(Tensor vectors, Tensor steps, Tensor offset, Tensor parity, Tensor points, Tensor halves) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("e8p_nearest", &ptqbench::nearest); }
