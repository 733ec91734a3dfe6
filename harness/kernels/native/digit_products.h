// Products of integer codes and rows of x in digits, for the operator: see digits.h.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tiles.h"

namespace ptqbench {

constexpr int64_t kSerial = 1 << 18;  // products that take as long as to start a second thread
constexpr int64_t kFewDigits = 4;     // rows of x that are always multiplied in registers
constexpr int64_t kDigitRows = 16;    // rows of x up to which products in bfloat16 are slower

// Digits that hold a value of x.
inline int digits_of(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16 ? 2 : 3; }

// Panels that are worth a thread of their own.
inline int64_t grain(const Weight& w, int64_t rows) {
  return std::max<int64_t>(1, kSerial / (rows * w.inputs * kPanel));
}

// Rows of x in digits, chunk by chunk of each group, in memory of this thread. Returns: no rows if a value is not
// finite.
inline DigitRows split(const Level& level, const Weight& w, const Rows& x, int digits) {
  static thread_local std::vector<uint32_t> words;
  static thread_local std::vector<float> units, sums;
  const int64_t height = x.count > 4 ? 8 : x.count > 2 ? 4 : x.count, stride = height * digits;
  const int64_t chunks = w.groups * ((w.group + kChunk - 1) / kChunk);
  grow(words, w.halves() * 4 * stride);
  grow(units, chunks * height);
  grow(sums, chunks * height);
  for (int64_t m = 0; m < x.count; ++m) {
    int64_t at = m;  // (chunk, row)
    for (int64_t group = 0; group < w.halves() * kHalf; group += w.group)
      for (int64_t k = group; k < group + w.group; k += kChunk, at += height) {
        const int64_t halves = std::min(kChunk, group + w.group - k) / kHalf;
        units[at] = level.split_chunk(x.values + m * x.stride + k, halves, digits,
                                      {words.data() + k / 4 * stride + m * digits, stride, 1}, &sums[at]);
        if (units[at] < 0) return {};
      }
  }
  return {words.data(), units.data(), sums.data(), digits, x.count, height};
}

// Few rows of x. Returns: whether x could be split into digits.
inline bool by_few_digits(const Level& level, const Weight& w, const Rows& x, int digits, const Output& y) {
  const DigitRows rows = split(level, w, x, digits);
  if (!rows.count) return false;
  at::parallel_for(0, w.panels(), grain(w, x.count),
                   [&](int64_t first, int64_t last) { level.few_digits(w, rows, y, first, last); });
  return true;
}

// A tile of row m of x, which is row `row + m` of the tensor, in digits. Returns: whether all values are finite.
inline bool split_tile(const Level& level, const at::Tensor& x, int64_t row, int64_t m, int64_t tile,
                       const DigitStacks& to) {
  const int64_t first = tile * kSteps * 4, last = std::min(first + kSteps * 4, to.words.steps * 4);
  const Lane<uint32_t> words = lane(to.words, tile, m);
  float values[kSteps * 4] = {};
  copy_row(x, row + m, first, std::min(last, x.size(1)) - first, values);
  for (int64_t k = first; k < last; k += kChunk) {
    const int64_t at = k / kChunk * to.words.count + m;
    to.units[at] =
        level.split_chunk(values + k - first, std::min(kChunk, last - k) / kHalf, static_cast<int>(to.words.digits),
                          {words.words + (k - first) / 4 * words.stride, words.stride, words.digit}, &to.sums[at]);
    if (to.units[at] < 0) return false;
  }
  return true;
}

// Whether the product of tiles in digits is the fastest one for the rows of x: a chunk must lie in one group. Products
// in registers have 1, 2, 4 or 8 rows, so that with two digits they are slower for 5 and 6 rows only.
inline bool many_digits_pay(const Level& level, const Weight& w, const at::Tensor& x) {
  const int64_t rows = x.size(0);
  const bool in_chunks = w.groups == 1 || w.group % kChunk == 0;
  if (!level.many_digits || !w.integers || !in_chunks || rows <= kFewDigits) return false;
  if (x.scalar_type() != at::kBFloat16) return true;
  if (rows <= kFew) return rows <= kFew - 2;
  return !level.many_bf16 || rows <= kDigitRows;
}

// Many rows of x. Returns: whether x could be split into digits; y is incomplete if not.
inline bool by_many_digits(const Level& level, const Weight& w, const at::Tensor& x, int digits, const Output& y) {
  static thread_local std::vector<float> units, sums;
  std::atomic<bool> finite{true};
  each_many(x.size(0), [&](int64_t row, int64_t count) {
    const int64_t inputs = w.halves() * kHalf, chunks = (inputs + kChunk - 1) / kChunk;
    const DigitStacks stacks{room<uint32_t>(count, inputs / 4, level.digits[digits - 2], digits),
                             grow(units, chunks * count), grow(sums, chunks * count)};
    each_tile(stacks.words, [&](int64_t m, int64_t tile) {
      if (!split_tile(level, x, row, m, tile, stacks)) finite = false;
    });
    if (finite)
      each_part(w.panels(), stacks.words, [&](const Part& part) { level.many_digits(w, stacks, part, y.from(row)); });
  });
  return finite;
}

}  // namespace ptqbench
