// Rows of a tensor as the kernels read them.
#pragma once
#include <ATen/ATen.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "weight.h"

namespace ptqbench {

constexpr int64_t kAlias = 2048;  // rows apart by multiples of so many bytes meet in few sets of the cache

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

// Rows [row, row + count) of x (M, K) in words, with zeros up to a multiple of 16 inputs: in place where possible, else
// in memory of this thread. `spread` copies rows whose stride would make them meet in few sets of the cache.
template <class Word>
Rows<Word> rows_of(const at::Tensor& x, int64_t row, int64_t count, bool spread) {
  const int64_t inputs = x.size(1), padded = (inputs + kHalf - 1) / kHalf * kHalf;
  const bool widen = sizeof(Word) == 4 && std::is_same_v<Word, float> && x.scalar_type() == at::kBFloat16;
  const int64_t bytes = inputs * x.element_size(), words = padded * (widen ? 4 : x.element_size()) / sizeof(Word);
  const char* source = static_cast<const char*>(x.const_data_ptr()) + row * bytes;
  if (!widen && padded == inputs && !(spread && bytes % kAlias == 0))
    return {reinterpret_cast<const Word*>(source), count, words};
  const int64_t stride = words + (spread ? kPanel : 0);
  Word* rows = scratch<Word>(count * stride);
  for (int64_t m = 0; m < count; ++m) {
    char* out = reinterpret_cast<char*>(rows + m * stride);
    std::memset(out, 0, words * sizeof(Word));
    if (widen) widen_row(reinterpret_cast<const uint16_t*>(source + m * bytes), inputs, reinterpret_cast<float*>(out));
    else std::memcpy(out, source + m * bytes, bytes);
  }
  return {rows, count, stride};
}

}  // namespace ptqbench
