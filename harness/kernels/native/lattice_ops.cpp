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

// Descending, equal magnitudes in the order of their coordinates: a network of 19 exchanges without branches, whose keys
// are the bits of a magnitude, then its coordinate.
void sort(const float* magnitude, float* ordered, uint8_t* order) {
  static constexpr uint8_t kPairs[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                                            {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
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
void try_incomplete(const Patterns& p, const Shifted& x, const float* products, int64_t columns, int64_t i, Best& best) {
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
    if (pattern[k] * x.magnitude[k] < pattern[best.change] * x.magnitude[best.change]) best.change = static_cast<uint8_t>(k);
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

const Tensor& checked(const Tensor& x, int64_t columns, at::ScalarType type) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == columns && x.is_contiguous() && x.scalar_type() == type, "a table has shape ",
              x.sizes(), " ", x.scalar_type(), "; expected (n, ", columns, ") ", type, ", contiguous");
  return x;
}

// The points nearest to vectors (8, n) float32.
Tensor nearest(const Tensor& vectors, const Tensor& steps, const Tensor& offset, const Tensor& parity,
               const Tensor& points, const Tensor& halves) {
  TORCH_CHECK(vectors.dim() == 2 && vectors.size(0) == kWidth && vectors.scalar_type() == at::kFloat, "vectors have shape ",
              vectors.sizes(), " ", vectors.scalar_type(), "; expected (8, n) float32");
  const Patterns p{steps.size(0), points.size(0), checked(steps, kWidth, at::kFloat).const_data_ptr<float>(),
                   checked(parity, 1, at::kFloat).const_data_ptr<float>(),
                   checked(points, kWidth, at::kFloat).const_data_ptr<float>(),
                   checked(halves, 3, at::kLong).const_data_ptr<int64_t>()};
  const Tensor input = vectors.contiguous(), output = at::empty_like(input);
  const int64_t n = input.size(1), columns = 2 * n;
  const float* v = input.const_data_ptr<float>();
  std::vector<Best> best(columns);
  const Tensor ordered = at::empty({kWidth, columns}, input.options());
  float* o = ordered.mutable_data_ptr<float>();
  at::parallel_for(0, columns, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      float sorted[kWidth];
      sort(Shifted(v, n, c).magnitude, sorted, best[c].order);
      for (int k = 0; k < kWidth; ++k) o[k * columns + c] = sorted[k];
    }
  });
  const Tensor complete = at::addmm(offset, steps, ordered);
  const float* products = complete.const_data_ptr<float>();
  std::vector<uint8_t> higher(columns);
  at::parallel_for(0, columns, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      higher[c] = best_complete(p, o, products, columns, c, Shifted(v, n, c).odd, best[c]);
  });
  std::vector<int64_t> few;  // columns
  for (int64_t c = 0; c < columns; ++c)
    if (higher[c]) few.push_back(c);
  const int64_t count = static_cast<int64_t>(few.size());
  const Tensor candidates = at::empty({kWidth, count}, input.options());
  float* magnitudes = candidates.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const Shifted x(v, n, few[i]);
    for (int k = 0; k < kWidth; ++k) magnitudes[k * count + i] = x.magnitude[k];
  }
  const Tensor incomplete = at::mm(points, candidates);
  const float* scores = incomplete.const_data_ptr<float>();
  at::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) try_incomplete(p, Shifted(v, n, few[i]), scores, count, i, best[few[i]]);
  });
  float* out = output.mutable_data_ptr<float>();
  at::parallel_for(0, n, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Shifted down(v, n, c), up(v, n, c + n);
      const bool minus = up.square - 2 * best[c + n].score < down.square - 2 * best[c].score;
      float point[kWidth];
      point_of(p, minus ? up : down, best[minus ? c + n : c], point);
      for (int k = 0; k < kWidth; ++k) out[k * n + c] = point[k] + (minus ? -kShift : kShift);
    }
  });
  return output;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("e8p_nearest(Tensor vectors, Tensor steps, Tensor offset, Tensor parity, Tensor points, Tensor halves) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("e8p_nearest", &ptqbench::nearest); }
