// The torch operators that search the codes of additive codebooks.
#pragma GCC optimize("fp-contract=off")
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "level.h"
#include "search.h"

namespace ptqbench {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16;  // rows that are searched on one thread, at least

// Keeps the codes (M, n) of one group that were found where they are better, and writes how far its vectors move,
// (n, 8).
void keep(const SearchedRows& r, int64_t books, int64_t* codes, float* moved, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float *before = r.gaps + 8 * row, *after = r.remaining + 8 * row;
    const bool better = squared_length(after) < squared_length(before);
    for (int k = 0; k < 8; ++k) moved[8 * row + k] = (before[k] - after[k]) * (better ? 1.0f : 0.0f);
    for (int64_t m = 0; better && m < books; ++m) codes[m * r.stride + row] = r.chosen[m * r.chosen_stride + row];
  }
}

// Searches the codes (M, n) of one group, and writes new ones where they are better.
// Returns: how far the vectors move, (n, 8).
Tensor search_group(const Search& s, const Tensor& gap, const Tensor& codes) {
  const int64_t rows = gap.size(0);
  const Tensor chosen = at::empty({s.books, rows}, codes.options()), remaining = at::empty_like(gap);
  const Tensor moved = at::empty_like(gap);
  const SearchedRows r{codes.const_data_ptr<int64_t>(),
                       codes.stride(0),
                       values_in<float>(gap, {rows, 8}, "gap"),
                       chosen.mutable_data_ptr<int64_t>(),
                       rows,
                       remaining.mutable_data_ptr<float>()};
  at::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    std::vector<float> memory(search_floats(s));
    std::vector<int64_t> integers(search_integers(s));
    current_level().search->search(s, r, first, last, memory.data(), integers.data());
    keep(r, s.books, codes.mutable_data_ptr<int64_t>(), moved.mutable_data_ptr<float>(), first, last);
  });
  return moved;
}

// The loop of `_Run.search` over b groups: codes (b, M, n), slope and moves (n, 8 b) change in place. Products of
// matrices are torch's own, for their order of sums.
void search_run(const Tensor& codes, const Tensor& slope, const Tensor& moves, const Tensor& inverse,
                const Tensor& inner, const Tensor& vectors, const Tensor& norms, const Tensor& tables, int64_t beam) {
  const int64_t groups = codes.size(0), books = codes.size(1), entries = norms.size(2), columns = 8 * groups;
  TORCH_CHECK(entries % 256 == 0 && beam > 0, "entries=", entries, ", beam=", beam,
              "; expected a multiple of 256, and 1 or more");
  rows_in<int64_t>(codes, {groups, books, codes.size(2)}, "codes");
  const float* v = values_in<float>(vectors, {groups, books, entries, 8}, "vectors");
  const float* n = values_in<float>(norms, {groups, books, entries}, "norms");
  const float* t = values_in<float>(tables, {groups, books, 8, entries}, "tables");
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t start = 8 * i, stop = start + 8, skipped = i * books * entries;
    const Search s{books, entries, beam, v + 8 * skipped, n + skipped, t + 8 * skipped};
    const Tensor change = inverse.select(0, i), moved = moves.slice(1, start, stop);
    const Tensor gap = at::mm(slope.slice(1, start, stop), change.t());
    moved.copy_(at::mm(search_group(s, gap, codes.select(0, i)), change));
    slope.slice(1, stop, columns).addmm_(moved, inner.slice(0, start, stop).slice(1, stop, columns), 1, -1);
  }
}

// What the search computes of `targets` (n, 8): scores (n, E) for one codebook, and squared lengths (n,).
std::tuple<Tensor, Tensor> scores(const Tensor& targets, const Tensor& norms, const Tensor& table) {
  const int64_t rows = targets.size(0), entries = norms.size(0);
  TORCH_CHECK(entries % 16 == 0, "entries=", entries, "; expected a multiple of 16");
  const float *x = values_in<float>(targets, {rows, 8}, "targets"), *n = values_in<float>(norms, {entries}, "norms");
  const float* t = values_in<float>(table, {8, entries}, "table");
  const Tensor out = at::empty({rows, entries}, targets.options()), lengths = at::empty({rows}, targets.options());
  float *y = out.mutable_data_ptr<float>(), *length = lengths.mutable_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    current_level().search->scores(x + 8 * r, n, t, entries, y + r * entries);
    length[r] = squared_length(x + 8 * r);
  }
  return {out, lengths};
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def(
      "additive_search(Tensor(a!) codes, Tensor(b!) slope, Tensor(c!) moves, Tensor inverse, Tensor inner, "
      "Tensor vectors, Tensor norms, Tensor tables, int beam) -> ()");
  m.def("additive_scores(Tensor targets, Tensor norms, Tensor table) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) {
  m.impl("additive_search", &ptqbench::search_run);
  m.impl("additive_scores", &ptqbench::scores);
}
