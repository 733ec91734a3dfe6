// The torch operator of float linears: few rows of x are multiplied as fast as the weight can be read.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "call.h"
#include "level.h"
#include "rows.h"

namespace ptqbench {
namespace {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool bfloat = in_bfloat(x);
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == x.scalar_type() &&
                  weight.size(1) == x.size(-1),
              "weight has shape ", weight.sizes(), " ", weight.scalar_type(), "; expected (rows, ", x.size(-1), ") ",
              x.scalar_type());
  const Tensor flat = as_matrix(x);
  if (flat.size(0) > kFew) return at::linear(x, weight, bias);
  const Tensor y = outputs_for(x, weight.size(0));
  if (!y.numel()) return y;
  const Matrix w{weight.const_data_ptr(), bfloat, weight.size(0), weight.size(1)};
  const Rows rows = rows_of(flat);
  const Bias added(bias);
  const Output out = output_to(y, added);
  at::parallel_for(0, (w.rows + kPanel - 1) / kPanel, 1,
                   [&](int64_t first, int64_t last) { current_level().few_dense(w, rows, out, first, last); });
  return y;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) { m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("dense_linear", &ptqbench::linear); }
