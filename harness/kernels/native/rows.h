// Rows of a tensor as the kernels read them; stacks.h has the order of many rows.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "weight.h"

namespace ptqbench {

constexpr int64_t kTogether = 1 << 14;  // words that are worth a thread of their own

template <class T>
T* grow(std::vector<T>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// Memory that calls on this thread share: fresh memory of the size of x would cost page faults at every call.
template <class T>
T* scratch(int64_t count) {
  static thread_local std::vector<T> memory;
  return grow(memory, count);
}

inline void widen_row(const uint16_t* bfloats, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(bfloats[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

// Inputs [first, first + count) of row m of x (M, K) in words, of one float32 or two bfloat16.
template <class Word>
void copy_row(const at::Tensor& x, int64_t m, int64_t first, int64_t count, Word* out) {
  const char* source = static_cast<const char*>(x.const_data_ptr()) + (m * x.size(1) + first) * x.element_size();
  if constexpr (std::is_same_v<Word, float>) {
    if (x.scalar_type() == at::kBFloat16) return widen_row(reinterpret_cast<const uint16_t*>(source), count, out);
  }
  std::memcpy(out, source, count * x.element_size());
}

// The rows of x (M, K) in float32, with zeros up to a multiple of 16 inputs: in place where possible, else in memory of
// this thread.
inline Rows rows_of(const at::Tensor& x) {
  const int64_t count = x.size(0), inputs = x.size(1), padded = (inputs + kHalf - 1) / kHalf * kHalf;
  if (x.scalar_type() == at::kFloat && padded == inputs) return {x.const_data_ptr<float>(), count, inputs};
  float* rows = scratch<float>(count * padded);
  at::parallel_for(0, count, std::max<int64_t>(1, kTogether / padded), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      copy_row(x, m, 0, inputs, rows + m * padded);
      std::fill(rows + m * padded + inputs, rows + (m + 1) * padded, 0.0f);
    }
  });
  return {rows, count, padded};
}

}  // namespace ptqbench
