// The torch operators that search the codes of additive codebooks.
#pragma GCC optimize("fp-contract=off")
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "level.h"
#include "search.h"

namespace ptqbench {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16;  // rows that are searched on one thread, at least

const SearchLevel& level() {
  const char* name = current_level().name;
  if (!std::strcmp(name, "plain")) return search_plain();
  return std::strcmp(name, "avx2") ? search_avx512() : search_avx2();
}

const float* floats(const Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.sizes() == shape && x.is_contiguous() && x.scalar_type() == at::kFloat, name, " has shape ", x.sizes(),
              " ", x.scalar_type(), "; expected ", shape, " float32, contiguous");
  return x.const_data_ptr<float>();
}

// Codes (M, n) and gaps (n, 8) that the search of `_Run._beam` finds from codes (M, n) and gaps (n, 8).
std::tuple<Tensor, Tensor> beam(const Tensor& gap, const Tensor& codes, const Tensor& vectors, const Tensor& norms,
                                const Tensor& tables, int64_t width) {
  const int64_t books = codes.size(0), rows = codes.size(1), entries = norms.size(1);
  TORCH_CHECK(codes.scalar_type() == at::kLong && (codes.stride(1) == 1 || rows == 1), "codes must be rows of int64");
  TORCH_CHECK(entries % 256 == 0 && width > 0, "entries=", entries, ", beam=", width,
              "; expected a multiple of 256, and 1 or more");
  const Search s{books, entries, width, floats(vectors, {books, entries, 8}, "vectors"),
                 floats(norms, {books, entries}, "norms"), floats(tables, {books, 8, entries}, "tables")};
  const Tensor chosen = at::empty({books, rows}, codes.options()), remaining = at::empty({rows, 8}, gap.options());
  const SearchedRows r{codes.const_data_ptr<int64_t>(), codes.stride(0),  floats(gap, {rows, 8}, "gap"),
                       chosen.mutable_data_ptr<int64_t>(), rows, remaining.mutable_data_ptr<float>()};
  at::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    std::vector<float> memory(search_floats(s));
    std::vector<int64_t> integers(search_integers(s));
    level().search(s, r, first, last, memory.data(), integers.data());
  });
  return {chosen, remaining};
}

// What the search computes of `targets` (n, 8): scores (n, E) for one codebook, and squared lengths (n,).
std::tuple<Tensor, Tensor> scores(const Tensor& targets, const Tensor& norms, const Tensor& table) {
  const int64_t rows = targets.size(0), entries = norms.size(0);
  TORCH_CHECK(entries % 16 == 0, "entries=", entries, "; expected a multiple of 16");
  const float *x = floats(targets, {rows, 8}, "targets"), *n = floats(norms, {entries}, "norms");
  const float* t = floats(table, {8, entries}, "table");
  const Tensor out = at::empty({rows, entries}, targets.options()), lengths = at::empty({rows}, targets.options());
  float *y = out.mutable_data_ptr<float>(), *length = lengths.mutable_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    level().scores(x + 8 * r, n, t, entries, y + r * entries);
    length[r] = squared_length(x + 8 * r);
  }
  return {out, lengths};
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("additive_beam(Tensor gap, Tensor codes, Tensor vectors, Tensor norms, Tensor tables, int beam) -> (Tensor, Tensor)");
  m.def("additive_scores(Tensor targets, Tensor norms, Tensor table) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) {
  m.impl("additive_beam", &ptqbench::beam);
  m.impl("additive_scores", &ptqbench::scores);
}
