// Products of many rows of x, for the operators: which product, and the rows that are multiplied at once.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>

#include "rows.h"

namespace ptqbench {

constexpr int64_t kRowBytes = 1 << 20;  // most bytes of rows of x that are multiplied at once

// Whether this processor multiplies bfloat16 matrices in an engine (AMX), which torch's product uses.
inline bool matrix_engine() {
  static const bool found = at::cpu::init_amx();
  return found;
}

// Whether many rows of x are multiplied by torch's product, which is faster than `kernels` or all there is.
template <class Kernels>
bool by_library(const Kernels& kernels, bool bfloat) {
  return !kernels.many || (bfloat && matrix_engine());
}

// Tiles of a weight, of any format, are decoded into the cache and multiplied, some rows at a time.
template <class Word, class Many, class AnyWeight>
void in_words(Many many, const AnyWeight& w, const at::Tensor& x, const Output& y) {
  const int64_t most = std::clamp<int64_t>(kRowBytes / (w.inputs * x.element_size()), 12, kMany);
  const int64_t parts = (x.size(0) + most - 1) / most;
  at::parallel_for(0, (w.panels() + 1) / 2, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = part * x.size(0) / parts, end = (part + 1) * x.size(0) / parts;
      many(w, rows_of<Word>(x, row, end - row, true), y.from(row), first, last);
    }
  });
}

// The same by the product for the dtype of x.
template <class Kernels, class AnyWeight>
void by_tiles(const Kernels& kernels, const AnyWeight& w, const at::Tensor& x, const Output& y) {
  if (x.scalar_type() == at::kBFloat16 && kernels.many_bf16) in_words<uint32_t>(kernels.many_bf16, w, x, y);
  else in_words<float>(kernels.many, w, x, y);
}

}  // namespace ptqbench
