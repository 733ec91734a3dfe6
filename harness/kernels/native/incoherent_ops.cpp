// The torch operator of weights that are rotated on both sides (QuIP#): y = ((x right) Q) V^T Q^T left.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "call.h"
#include "level.h"
#include "rows.h"
#include "vectors_product.h"

namespace ptqbench {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kGrain = 1 << 13;      // values that are transformed on one thread, at least
constexpr int64_t kKeptBytes = 8 << 20;  // of a matrix whose memory is kept, at most

Rotation rotation_of(const Tensor& factors, const optional<Tensor>& matrix, int64_t size, double norm) {
  const auto* values = reinterpret_cast<const uint16_t*>(values_in<at::Half>(factors, {size}, "factors"));
  const int64_t order = matrix ? matrix->size(0) : 1, rest = size / order;
  TORCH_CHECK(order * rest == size && (rest & (rest - 1)) == 0, "a matrix of order ", order,
              " and a power of two do not transform ", size, " values");
  return {values, matrix ? values_in<float>(*matrix, {order, order}, "matrix") : nullptr, order, size,
          static_cast<float>(norm / std::sqrt(static_cast<double>(rest)))};
}

enum Place { kEntered, kSums };

// A matrix between two steps of a call, in memory that calls on this thread share: fresh memory costs page faults.
Tensor matrix(Place place, int64_t rows, int64_t columns, at::ScalarType type) {
  static thread_local std::vector<char> memory[2];
  const int64_t bytes = rows * columns * static_cast<int64_t>(at::elementSize(type));
  if (bytes > kKeptBytes) return at::empty({rows, columns}, type);
  if (static_cast<int64_t>(memory[place].size()) < bytes) memory[place].resize(bytes);
  return at::from_blob(memory[place].data(), {rows, columns}, type);
}

char* row_of(const Tensor& x, int64_t m) {
  return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + m * x.size(1) * x.element_size();
}

// Calls use(row, memory for two rows) for all rows of `size` values, shared among the threads.
template <class Use>
void each_row(int64_t rows, int64_t size, Use&& use) {
  at::parallel_for(0, rows, (kGrain + size - 1) / size, [&](int64_t first, int64_t last) {
    float* memory = scratch<float>(2 * size);
    for (int64_t m = first; m < last; ++m) use(m, memory);
  });
}

Tensor entered(const Rotation& q, const Tensor& x, bool bfloat) {
  const Tensor y = matrix(kEntered, x.size(0), x.size(1), bfloat ? at::kBFloat16 : at::kFloat);
  each_row(x.size(0), q.size, [&](int64_t m, float* memory) {
    current_level().vectors->enter(q, row_of(x, m), x.scalar_type() == at::kBFloat16, memory, row_of(y, m), bfloat);
  });
  return y;
}

void left(const Rotation& q, const Tensor& x, const optional<Tensor>& bias, const Tensor& y) {
  const Bias added(bias);
  each_row(x.size(0), q.size, [&](int64_t m, float* memory) {
    current_level().vectors->leave(q, reinterpret_cast<float*>(row_of(x, m)), memory, added.values(), row_of(y, m),
                                   y.scalar_type() == at::kBFloat16);
  });
}

Tensor linear(const Tensor& x, at::TensorList codes, at::TensorList tables, const Tensor& scale, const Tensor& right,
              const Tensor& left_factors, const optional<Tensor>& right_matrix, const optional<Tensor>& left_matrix,
              const optional<Tensor>& bias) {
  const int64_t rows = left_factors.size(0), inputs = x.size(-1);
  Vectors w = vectors_of(codes, tables, rows, inputs);
  const float* scales = values_in<float>(scale, {w.count}, "scale");
  for (int64_t b = 0; b < w.count; ++b) w.books[b].factor = scales[b] / scales[0];
  const Rotation in = rotation_of(right, right_matrix, inputs, 1);
  const Rotation out = rotation_of(left_factors, left_matrix, rows, scales[0]);
  const Tensor flat = as_matrix(x), y = outputs_for(x, rows);
  const bool bfloat = in_bfloat(x);
  const Tensor sums = matrix(kSums, flat.size(0), rows, at::kFloat);
  product(w, entered(in, flat, bfloat && flat.size(0) > kFew), std::nullopt, sums);
  left(out, sums, bias, y.view({-1, rows}));
  return y;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def(
      "incoherent_linear(Tensor x, Tensor[] codes, Tensor[] tables, Tensor scale, Tensor right, Tensor left, "
      "Tensor? right_matrix, Tensor? left_matrix, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("incoherent_linear", &ptqbench::linear); }
