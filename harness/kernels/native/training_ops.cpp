// The torch operators of a weight of additive codebooks under training: it is decoded, and its gradient goes back to
// codebooks and scales, in one pass over the weight each. Sums have the order of torch's operators.
#pragma GCC optimize("fp-contract=off")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed inline
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

namespace ptqbench {
namespace {

using at::Tensor;

constexpr int64_t kSize = 8;   // weights of a group
constexpr int64_t kRows = 32;  // rows of the weight that stay in a core's cache

using F = float __attribute__((vector_size(32)));

inline F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

// Codes, as indices (n, M) into the entries of all codebooks (M E, 8), of a weight of `rows` rows.
struct Coded {
  const int32_t* index;
  const float *entries, *scale;
  int64_t books, rows, groups;

  // The vector of a group, without its scale.
  inline F vector(int64_t group) const {
    F sum{};
    for (int64_t m = 0; m < books; ++m) sum += load(entries + kSize * index[group * books + m]);
    return sum;
  }
};

Coded coded(const Tensor& index, const Tensor& codebooks, const Tensor& scale) {
  TORCH_CHECK(index.dim() == 2 && index.scalar_type() == at::kInt && index.is_contiguous(), "index has shape ",
              index.sizes(), " ", index.scalar_type(), "; expected (n, M) int32, contiguous");
  TORCH_CHECK(codebooks.dim() == 3 && codebooks.size(0) == index.size(1) && codebooks.size(2) == kSize &&
              codebooks.scalar_type() == at::kFloat && codebooks.is_contiguous(),
              "codebooks have shape ", codebooks.sizes(), " ", codebooks.scalar_type(), "; expected (M, E, 8) float32");
  TORCH_CHECK(scale.dim() == 1 && scale.scalar_type() == at::kFloat && scale.is_contiguous() && scale.size(0) > 0 &&
              index.size(0) % scale.size(0) == 0, "scale has shape ", scale.sizes(), " ", scale.scalar_type(),
              "; expected (N,) float32, where N divides ", index.size(0));
  return {index.const_data_ptr<int32_t>(), codebooks.const_data_ptr<float>(), scale.const_data_ptr<float>(),
          index.size(1), scale.size(0), index.size(0) / scale.size(0)};
}

// The weight (N, K).
Tensor decode(const Tensor& index, const Tensor& codebooks, const Tensor& scale) {
  const Coded w = coded(index, codebooks, scale);
  const Tensor weight = at::empty({w.rows, w.groups * kSize}, scale.options());
  float* out = weight.mutable_data_ptr<float>();
  at::parallel_for(0, w.rows, kRows, [&](int64_t first, int64_t last) {
    for (int64_t group = first * w.groups; group < last * w.groups; ++group) {
      store(out + kSize * group, w.scale[group / w.groups] * w.vector(group));
    }
  });
  return weight;
}

// For each row, the sum of gradient times vectors; torch's own sum, for its order.
Tensor scale_gradient(const Coded& w, const Tensor& grad) {
  const float* g = grad.const_data_ptr<float>();
  const Tensor sums = at::empty({w.rows}, grad.options());
  at::parallel_for(0, w.rows, kRows, [&](int64_t first, int64_t last) {
    for (int64_t start = first; start < last; start += kRows) {
      const int64_t end = std::min(start + kRows, last);
      const Tensor products = at::empty({end - start, grad.size(1)}, grad.options());
      float* out = products.mutable_data_ptr<float>();
      for (int64_t group = start * w.groups; group < end * w.groups; ++group, out += kSize) {
        store(out, load(g + kSize * group) * w.vector(group));
      }
      sums.slice(0, start, end).copy_(products.sum(1));
    }
  });
  return sums;
}

// For each entry, the sum of gradient times scale over the groups that select it, in their order: a codebook's sums stay
// in the first cache, while the gradient is read once.
Tensor entry_gradient(const Coded& w, const Tensor& grad, const Tensor& codebooks) {
  const Tensor sums = at::zeros_like(codebooks);
  const float* g = grad.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  at::parallel_for(0, w.books, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = 0, group = 0; row < w.rows; ++row) {
      const float scale = w.scale[row];
      for (int64_t j = 0; j < w.groups; ++j, ++group) {
        const F values = load(g + kSize * group) * scale;
        for (int64_t m = first; m < last; ++m) {
          float* sum = out + kSize * w.index[group * w.books + m];
          store(sum, load(sum) + values);
        }
      }
    }
  });
  return sums;
}

// The gradients of codebooks and scales for the gradient (N, K) of the decoded weight.
std::tuple<Tensor, Tensor> decode_backward(const Tensor& grad, const Tensor& index, const Tensor& codebooks,
                                           const Tensor& scale) {
  const Coded w = coded(index, codebooks, scale);
  const Tensor g = grad.contiguous();
  TORCH_CHECK(g.dim() == 2 && g.size(0) == w.rows && g.size(1) == w.groups * kSize && g.scalar_type() == at::kFloat,
              "grad has shape ", g.sizes(), "; expected (", w.rows, ", ", w.groups * kSize, ") float32");
  return {entry_gradient(w, g, codebooks), scale_gradient(w, g)};
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("additive_decode(Tensor index, Tensor codebooks, Tensor scale) -> Tensor");
  m.def("additive_decode_backward(Tensor grad, Tensor index, Tensor codebooks, Tensor scale) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) {
  m.impl("additive_decode", &ptqbench::decode);
  m.impl("additive_decode_backward", &ptqbench::decode_backward);
}
