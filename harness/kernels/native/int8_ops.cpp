// The torch operator of linears whose inputs are quantized to 8 bits: quantization, product, scales and bias in one
// call.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "level.h"
#include "tiles.h"
#include "weight.h"

namespace ptqbench {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kParallelRows = 8;  // rows of x whose quantization is worth a second thread

// How the inputs are quantized, see harness.core.scheme.ActivationFormat.
struct Format {
  optional<float> fixed;  // calibrated scale
  float clip, steps, low, high;
  float threshold;  // 0: no outliers
  bool shared;      // one scale for all tokens of a sequence
};

ByteWeight weight_of(const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t rows, int64_t inputs) {
  const Panels panels = panels_of(codes, rows, inputs);
  TORCH_CHECK(panels.bits == 2 || panels.bits == 4 || panels.bits == 8, "codes have ", panels.bits,
              " bits; expected 2, 4 or 8");
  return {panels, values_in<float>(scale, {panels.panels(), kPanel}, "scale"),
          values_in<int32_t>(zero, {panels.panels(), kPanel}, "zero")};
}

// The columns of rows of one sequence in which a magnitude reaches the threshold.
std::vector<int64_t> outlier_columns(const Rows& x, int64_t inputs, float threshold) {
  std::vector<float> largest(inputs, 0.0f);
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t k = 0; k < inputs; ++k) largest[k] = std::max(largest[k], std::fabs(x.values[m * x.stride + k]));
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < inputs; ++k)
    if (largest[k] >= threshold) columns.push_back(k);
  return columns;
}

// The rows of x in codes, and what is needed to multiply them.
struct Encoded {
  std::vector<float> scale;
  std::vector<int32_t> sums;
  std::vector<std::vector<int64_t>> columns;  // of outliers, a sequence each
  std::vector<Outliers> outliers;             // a row each
};

// Inputs [first, first + count) of row m of x without outliers, in memory of this thread if the row has any.
const float* regular(const Rows& x, const Encoded& encoded, int64_t m, int64_t first, int64_t count) {
  const float* values = x.values + m * x.stride + first;
  if (encoded.outliers.empty() || !encoded.outliers[m].count) return values;
  static thread_local std::vector<float> copy;
  copy.assign(values, values + count);
  for (int64_t i = 0; i < encoded.outliers[m].count; ++i) {
    const int64_t column = encoded.outliers[m].columns[i] - first;
    if (column >= 0 && column < count) copy[column] = 0;
  }
  return copy.data();
}

void find_outliers(const Rows& x, int64_t inputs, int64_t tokens, float threshold, Encoded& encoded) {
  encoded.columns.resize(x.count / tokens);
  for (int64_t sequence = 0; sequence < x.count / tokens; ++sequence)
    encoded.columns[sequence] =
        outlier_columns({x.values + sequence * tokens * x.stride, tokens, x.stride}, inputs, threshold);
  for (int64_t m = 0; m < x.count; ++m) {
    const std::vector<int64_t>& columns = encoded.columns[m / tokens];
    encoded.outliers.push_back({x.values + m * x.stride, columns.data(), static_cast<int64_t>(columns.size())});
  }
}

void find_scales(const Level& level, const Rows& x, const Format& format, int64_t tokens, Encoded& encoded) {
  encoded.scale.assign(x.count, format.fixed.value_or(0));
  if (format.fixed) return;
  at::parallel_for(0, x.count, kParallelRows, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m)
      encoded.scale[m] = level.absmax(regular(x, encoded, m, 0, x.stride), x.stride);
  });
  if (format.shared)
    for (auto row = encoded.scale.begin(); row != encoded.scale.end(); row += tokens)
      std::fill(row, row + tokens, *std::max_element(row, row + tokens));
  for (float& scale : encoded.scale) {
    scale = scale * format.clip / format.steps;
    if (scale <= 0) scale = 1;
  }
}

Encoded prepare(const Level& level, const ByteWeight& w, const Rows& x, const Format& format, int64_t tokens,
                int64_t outlier_tokens) {
  Encoded encoded;
  if (format.threshold > 0) find_outliers(x, w.inputs, outlier_tokens, format.threshold, encoded);
  find_scales(level, x, format, tokens, encoded);
  encoded.sums.resize(x.count);
  return encoded;
}

// Rows [row, row + count) of x in codes.
ByteRows encode(const Level& level, const ByteWeight& w, const Rows& x, const Format& format, Encoded& encoded,
                int64_t row, int64_t count) {
  const Stacks<uint32_t> words = room<uint32_t>(count, w.blocks() * kBlock / 4, level.words);
  each_tile(words, [&](int64_t m, int64_t tile) {
    const int64_t k = tile * kSteps * 4, inputs = std::min(kSteps * 4, x.stride - k);
    const Lane<uint32_t> to = lane(words, tile, m);
    encoded.sums[row + m] += level.encode(regular(x, encoded, row + m, k, inputs), inputs, encoded.scale[row + m],
                                          format.low, format.high, to.words, to.stride);
    for (int64_t word = inputs / 4; word < std::min(kSteps, words.steps - k / 4); ++word)
      to.words[word * to.stride] = 0;
  });
  return {words, encoded.scale.data() + row, encoded.sums.data() + row,
          encoded.outliers.empty() ? nullptr : encoded.outliers.data() + row};
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& zero,
              const optional<Tensor>& bias, const optional<Tensor>& fixed, double clip, double steps, int64_t low,
              int64_t high, double threshold, bool shared, int64_t rows) {
  check_dtype(x);
  const ByteWeight w = weight_of(codes, scale, zero, rows, x.size(-1));
  const Level& level = current_level();
  const Tensor flat = as_matrix(x), y = outputs_for(x, rows);
  if (!y.numel()) return y;
  const Bias added(bias);
  const Output out = output_to(y, added);
  const Format format{fixed ? optional<float>(fixed->item<float>()) : std::nullopt,
                      static_cast<float>(clip),
                      static_cast<float>(steps),
                      static_cast<float>(low),
                      static_cast<float>(high),
                      static_cast<float>(threshold),
                      shared};
  const int64_t count = flat.size(0);
  const Rows all = rows_of(flat);
  Encoded encoded =
      prepare(level, w, all, format, x.dim() > 2 ? count / x.size(0) : count, x.dim() > 1 ? x.size(-2) : 1);
  each_many(count, [&](int64_t row, int64_t part_rows) {
    const ByteRows rows = encode(level, w, all, format, encoded, row, part_rows);
    each_part(w.panels(), rows.words, [&](const Part& part) { level.bytes(w, rows, part, out.from(row)); });
  });
  return y;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def(
      "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero, Tensor? bias, Tensor? fixed, float clip, "
      "float steps, int low, int high, float threshold, bool shared, int rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("int8_linear", &ptqbench::linear); }
