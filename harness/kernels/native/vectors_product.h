// The product with a weight of vectors, for the operators of its formats.
#pragma once
#include <ATen/ATen.h>

#include "vectors.h"

namespace ptqbench {

// The books of a weight (rows, inputs), checked; every factor is 1.
Vectors vectors_of(at::TensorList codes, at::TensorList tables, int64_t rows, int64_t inputs);

// y = x W^T + bias for x (M, K) contiguous, in float32 or bfloat16, to y (M, N), of either dtype.
void product(const Vectors& w, const at::Tensor& x, const std::optional<at::Tensor>& bias, const at::Tensor& y);

}  // namespace ptqbench
