// What the operators of linears share: checks, x as a matrix, and y with its bias.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "checks.h"
#include "weight.h"

namespace ptqbench {

inline void check_dtype(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x has dtype ", x.scalar_type(),
              "; expected float32 or bfloat16");
}

// Whether x is in bfloat16, and not in float32; other dtypes are refused.
inline bool in_bfloat(const at::Tensor& x) {
  check_dtype(x);
  return x.scalar_type() == at::kBFloat16;
}

// x (..., K) as a contiguous matrix (M, K).
inline at::Tensor as_matrix(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

// Empty outputs (..., N) for x (..., K), in its dtype.
inline at::Tensor outputs_for(const at::Tensor& x, int64_t rows) {
  auto shape = x.sizes().vec();
  shape.back() = rows;
  return at::empty(shape, x.options());
}

// A bias in float32, whose memory this object keeps.
struct Bias {
  at::Tensor floats;

  explicit Bias(const std::optional<at::Tensor>& bias) {
    if (bias) floats = bias->to(at::kFloat).contiguous();
  }
  const float* values() const { return floats.defined() ? floats.const_data_ptr<float>() : nullptr; }
};

// y (..., N), contiguous, and the bias that is added to it.
inline Output output_to(const at::Tensor& y, const Bias& bias) {
  return {y.mutable_data_ptr(), y.size(-1), bias.values(), y.scalar_type() == at::kBFloat16};
}

// The codes of a weight (rows, inputs), checked.
inline Panels panels_of(const at::Tensor& codes, int64_t rows, int64_t inputs) {
  TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() && codes.scalar_type() == at::kInt && codes.size(3) == kPanel,
              "codes have shape ", codes.sizes(), " ", codes.scalar_type(),
              "; expected (panels, blocks, bits, 16) int32");
  const Panels p{reinterpret_cast<const uint8_t*>(codes.const_data_ptr<int>()), static_cast<int>(codes.size(2)), rows,
                 inputs};
  TORCH_CHECK(p.panels() == codes.size(0) && p.blocks() == codes.size(1), "codes of shape ", codes.sizes(),
              " do not hold a weight of ", rows, " x ", inputs);
  return p;
}

}  // namespace ptqbench
