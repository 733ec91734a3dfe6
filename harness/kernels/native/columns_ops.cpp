// GPTQ's loop over the columns of a weight, for uniform grids: each operation of torch's loop, rounded as there.
//
// torch updates later columns by w += -u * err over the whole matrix, parted among its threads. Of each part of a row
// it takes as many whole pairs of vectors as fit, with fused products, and rounds the products of what remains. A
// weight has these parts here too, but each thread solves all columns for its own outputs, which stay in its cache.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"

#pragma GCC optimize("O3", "fp-contract=off")
#pragma GCC target("avx2,fma")

namespace ptqbench {
namespace {

using at::Tensor;

constexpr int64_t kTorchGrain = 32768;  // at::internal::GRAIN_SIZE: elements below which torch uses one thread
constexpr int64_t kPair = 16;           // elements of two vectors of AVX2, with which torch compiles this operation
constexpr int64_t kStrip = 256;         // outputs that are solved together: 128 columns of them are 128 KiB

struct Grid {
  float low, high;  // smallest and largest code, minus the zero point if symmetric
  bool symmetric;
};

// A matrix of float32 with contiguous rows, of which `data` may be const.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  Rows(const Tensor& x, int64_t rows, int64_t columns, const char* name)
      : data(rows_in<T>(x, {rows, columns}, name)), stride(x.stride(0)) {}
  T* row(int64_t i) const { return data + i * stride; }
};

// Rounds w to the grid: values q, and the errors (w - q) / pivot.
void snap(const float* w, const float* scale, const float* zero_point, const Grid& grid, float pivot, float* q,
          float* err, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    float steps = w[n] / scale[n];
    const float zero = grid.symmetric ? 0.0f : zero_point[n];
    if (!grid.symmetric) steps += zero;
    steps = __builtin_rintf(steps);
    steps = steps < grid.low ? grid.low : steps;
    steps = steps > grid.high ? grid.high : steps;
    if (!grid.symmetric) steps -= zero;
    q[n] = steps * scale[n];
  }
  for (int64_t n = 0; n < count; ++n) err[n] = (w[n] - q[n]) / pivot;
}

void subtract_fused(float* w, float u, const float* err, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) w[n] = __builtin_fmaf(-u, err[n], w[n]);
}

void subtract_rounded(float* w, float u, const float* err, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const float product = -u * err[n];
    w[n] += product;
  }
}

// How torch parts the matrix (rows, outputs) that it updates.
struct Parts {
  int64_t outputs, size;

  Parts(int64_t rows, int64_t outputs_) : outputs(outputs_), size(rows * outputs_) {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), (size + kTorchGrain - 1) / kTorchGrain);
    if (threads > 1) size = (size + threads - 1) / threads;
  }

  // w -= u err for the outputs [first, last) of row `row`.
  void subtract(int64_t row, float* w, float u, const float* err, int64_t first, int64_t last) const {
    const int64_t start = row * outputs;
    for (int64_t begin = 0; begin < outputs;) {
      const int64_t end = std::min(outputs, ((start + begin) / size + 1) * size - start);
      const int64_t middle = begin + (end - begin) / kPair * kPair;
      subtract_fused(w, u, err, std::max(first, begin), std::min(last, middle));
      subtract_rounded(w, u, err, std::max(first, middle), std::min(last, end));
      begin = end;
    }
  }
};

void solve_columns(const Tensor& weight, const Tensor& values, const Tensor& errors, const Tensor& factor,
                   const Tensor& scale, const Tensor& zero_point, at::IntArrayRef groups, double low, double high,
                   bool symmetric) {
  const int64_t columns = values.size(0), all = weight.size(0), outputs = weight.size(1);
  TORCH_CHECK(columns <= all && static_cast<int64_t>(groups.size()) == columns, columns, " columns and ", groups.size(),
              " groups; expected as many of each, at most ", all);
  TORCH_CHECK(factor.dim() == 2 && factor.scalar_type() == at::kFloat && factor.size(0) >= columns &&
                  factor.size(1) >= all,
              "factor has shape ", factor.sizes(), " ", factor.scalar_type(), "; expected (", columns, ", ", all,
              ") float32, or more");
  for (const int64_t g : groups) TORCH_CHECK(g >= 0 && g < scale.size(0), "there is no group ", g);
  const Grid grid{static_cast<float>(low), static_cast<float>(high), symmetric};
  const Rows<float> w(weight, all, outputs, "weight"), q(values, columns, outputs, "values");
  const Rows<float> err(errors, columns, outputs, "errors");
  const Rows<const float> s(scale, scale.size(0), outputs, "scale");
  const Rows<const float> z(zero_point, scale.size(0), outputs, "zero_point");
  const float* u = factor.const_data_ptr<float>();
  std::vector<Parts> parts;
  for (int64_t i = 0; i < columns; ++i) parts.emplace_back(all - i - 1, outputs);
  const int64_t step = factor.stride(1);
  const int64_t strips = (outputs + kStrip - 1) / kStrip;
  at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, last = std::min(outputs, first + kStrip);
      for (int64_t i = 0; i < columns; ++i) {
        const float* row = u + i * factor.stride(0);  // Cholesky factors are often stored by columns
        const int64_t g = groups[i];
        snap(w.row(i) + first, s.row(g) + first, z.row(g) + first, grid, row[i * step], q.row(i) + first,
             err.row(i) + first, last - first);
        for (int64_t j = i + 1; j < all; ++j)
          parts[i].subtract(j - i - 1, w.row(j), row[j * step], err.row(i), first, last);
      }
    }
  });
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def(
      "solve_columns(Tensor(a!) weight, Tensor(b!) values, Tensor(c!) errors, Tensor factor, Tensor scale, "
      "Tensor zero_point, int[] groups, float low, float high, bool symmetric) -> ()");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("solve_columns", &ptqbench::solve_columns); }
