// The torch operator of linears whose inputs are quantized to 8 bits: quantization, product, scales and bias in one
// call.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "level.h"
#include "rows.h"
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
std::vector<int64_t> outlier_columns(const Rows<float>& x, int64_t inputs, float threshold) {
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
  std::vector<uint32_t> words;
  std::vector<std::vector<int64_t>> columns;  // of outliers, a sequence each
  std::vector<Outliers> outliers;             // a row each
  int64_t stride;

  ByteRows rows(int64_t row, int64_t count) const {
    return {{words.data() + row * stride, count, stride},
            scale.data() + row,
            sums.data() + row,
            outliers.empty() ? nullptr : outliers.data() + row};
  }
};

// Row m of x without outliers, in memory of this thread if there are any.
const float* regular(const Rows<float>& x, const Encoded& encoded, int64_t m) {
  const float* row = x.values + m * x.stride;
  if (encoded.outliers.empty() || !encoded.outliers[m].count) return row;
  static thread_local std::vector<float> copy;
  copy.assign(row, row + x.stride);
  for (int64_t i = 0; i < encoded.outliers[m].count; ++i) copy[encoded.outliers[m].columns[i]] = 0;
  return copy.data();
}

void find_outliers(const Rows<float>& x, int64_t inputs, int64_t tokens, float threshold, Encoded& encoded) {
  encoded.columns.resize(x.count / tokens);
  for (int64_t sequence = 0; sequence < x.count / tokens; ++sequence)
    encoded.columns[sequence] =
        outlier_columns({x.values + sequence * tokens * x.stride, tokens, x.stride}, inputs, threshold);
  for (int64_t m = 0; m < x.count; ++m) {
    const std::vector<int64_t>& columns = encoded.columns[m / tokens];
    encoded.outliers.push_back({x.values + m * x.stride, columns.data(), static_cast<int64_t>(columns.size())});
  }
}

void find_scales(const Level& level, const Rows<float>& x, const Format& format, int64_t tokens, Encoded& encoded) {
  encoded.scale.assign(x.count, format.fixed.value_or(0));
  if (format.fixed) return;
  at::parallel_for(0, x.count, kParallelRows, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) encoded.scale[m] = level.absmax(regular(x, encoded, m), x.stride);
  });
  if (format.shared)
    for (auto row = encoded.scale.begin(); row != encoded.scale.end(); row += tokens)
      std::fill(row, row + tokens, *std::max_element(row, row + tokens));
  for (float& scale : encoded.scale) {
    scale = scale * format.clip / format.steps;
    if (scale <= 0) scale = 1;
  }
}

void encode_row(const Level& level, const Rows<float>& x, const Format& format, int64_t m, Encoded& encoded) {
  int8_t* codes = reinterpret_cast<int8_t*>(encoded.words.data() + m * encoded.stride);
  encoded.sums[m] = level.encode(regular(x, encoded, m), x.stride, encoded.scale[m], format.low, format.high, codes);
}

Encoded encode(const Level& level, const ByteWeight& w, const Rows<float>& x, const Format& format, int64_t tokens,
               int64_t outlier_tokens) {
  Encoded encoded;
  encoded.stride = w.blocks() * kBlock / 4;
  if (format.threshold > 0) find_outliers(x, w.inputs, outlier_tokens, format.threshold, encoded);
  find_scales(level, x, format, tokens, encoded);
  encoded.sums.resize(x.count);
  encoded.words.resize(x.count * encoded.stride);
  at::parallel_for(0, x.count, kParallelRows, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) encode_row(level, x, format, m, encoded);
  });
  return encoded;
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& zero,
              const optional<Tensor>& bias, const optional<Tensor>& fixed, double clip, double steps, int64_t low,
              int64_t high, double threshold, bool shared, int64_t rows) {
  in_bfloat(x);
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
  const Rows<float> all = rows_of<float>(flat, 0, count, false);
  const Encoded encoded =
      encode(level, w, all, format, x.dim() > 2 ? count / x.size(0) : count, x.dim() > 1 ? x.size(-2) : 1);
  at::parallel_for(0, (w.panels() + 1) / 2, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = 0; row < count; row += kMany)
      level.bytes(w, encoded.rows(row, std::min(kMany, count - row)), out.from(row), first, last);
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
