// Checks of tensors that operators are given.
#pragma once
#include <ATen/ATen.h>

namespace ptqbench {

// The values of a tensor whose rows are contiguous. Raises: RuntimeError if its shape or dtype is another.
template <class T>
T* rows_in(const at::Tensor& x, at::IntArrayRef shape, const char* name) {
  constexpr at::ScalarType type = c10::CppTypeToScalarType<std::remove_const_t<T>>::value;
  TORCH_CHECK(x.sizes() == shape && (x.stride(-1) == 1 || x.size(-1) <= 1) && x.scalar_type() == type, name,
              " has shape ", x.sizes(), " ", x.scalar_type(), ", strides ", x.strides(), "; expected ", shape, " ",
              type, ", with contiguous rows");
  if constexpr (std::is_const_v<T>) return x.const_data_ptr<std::remove_const_t<T>>();
  else return x.mutable_data_ptr<T>();
}

// The values of a contiguous tensor. Raises: likewise.
template <class T>
const T* values_in(const at::Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.is_contiguous(), name, " has strides ", x.strides(), "; expected a contiguous tensor");
  return rows_in<const T>(x, shape, name);
}

}  // namespace ptqbench
