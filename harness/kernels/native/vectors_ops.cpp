// The torch operator of additive codebooks, and the product that every weight of vectors shares.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "call.h"
#include "level.h"
#include "rows.h"
#include "tiles.h"
#include "vectors_product.h"

namespace ptqbench {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kSlabBytes = 4 << 20;  // most bytes of decoded rows of W at once

Book book_of(const Tensor& codes, const Tensor& table, int64_t rows) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kVector && table.is_contiguous(), "a table has shape ",
              table.sizes(), "; expected (entries, 8)");
  TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.size(0) == rows && codes.size(1) % 2 == 0,
              "codes have shape ", codes.sizes(), "; expected (", rows, ", an even number)");
  const bool wide = table.scalar_type() != at::kFloat;
  TORCH_CHECK(codes.scalar_type() == (wide ? at::kShort : at::kByte), "codes of a table in ", table.scalar_type(),
              " have dtype ", codes.scalar_type(), "; expected int16 for int8 and float16, uint8 for float32");
  const Points points = table.scalar_type() == at::kChar ? Points::int8 : wide ? Points::float16 : Points::float32;
  TORCH_CHECK(points != Points::float16 || table.scalar_type() == at::kHalf, "a table has dtype ", table.scalar_type(),
              "; expected int8, float16 or float32");
  TORCH_CHECK(points != Points::int8 || table.size(0) == 512, "a table in int8 has ", table.size(0),
              " rows; expected 512");
  return {table.const_data_ptr(), codes.const_data_ptr(), points, 1};
}

// Few rows of x: a vector is multiplied where it is read.
void by_registers(const Level& level, const Vectors& w, const Tensor& x, const Output& y) {
  const Rows rows = rows_of(x);
  at::parallel_for(0, w.panels(), 1, [&](int64_t first, int64_t last) { level.vectors->few(w, rows, y, first, last); });
}

// Many rows of x where torch's product is the faster one: slabs of W are decoded in the dtype of x.
void by_slabs(const Level& level, const Vectors& w, const Tensor& x, const optional<Tensor>& bias, const Tensor& y) {
  const int64_t height = std::max<int64_t>(kSlabBytes / (w.inputs * x.element_size()), 1);
  for (int64_t first = 0; first < w.rows; first += height) {
    const int64_t last = std::min(first + height, w.rows);
    const Tensor slab = at::empty({last - first, w.inputs}, x.options());
    at::parallel_for(first, last, 16, [&](int64_t from, int64_t to) {
      void* values = static_cast<char*>(slab.mutable_data_ptr()) + (from - first) * w.inputs * x.element_size();
      if (x.scalar_type() == at::kFloat) level.vectors->decode(w, from, to, static_cast<float*>(values));
      else level.vectors->decode_bf16(w, from, to, static_cast<uint16_t*>(values));
    });
    y.slice(1, first, last).copy_(at::mm(x, slab.t()));
  }
  if (bias) y.add_(*bias);
}

Tensor linear(const Tensor& x, at::TensorList codes, at::TensorList tables, const Tensor& scale,
              const optional<Tensor>& bias, int64_t rows) {
  Vectors w = vectors_of(codes, tables, rows, x.size(-1));
  w.scale = values_in<float>(scale, {rows}, "scale");
  const Tensor y = outputs_for(x, rows);
  product(w, as_matrix(x), bias, y.view({-1, rows}));
  return y;
}

}  // namespace

Vectors vectors_of(at::TensorList codes, at::TensorList tables, int64_t rows, int64_t inputs) {
  TORCH_CHECK(codes.size() == tables.size() && !codes.empty() && codes.size() <= kBooks, codes.size(), " codes and ",
              tables.size(), " tables; expected as many of each, at most ", kBooks);
  Vectors w{{}, static_cast<int64_t>(codes.size()), nullptr, rows, inputs, codes[0].size(-1)};
  for (size_t b = 0; b < codes.size(); ++b) {
    w.books[b] = book_of(codes[b], tables[b], rows);
    TORCH_CHECK(inputs % kVector == 0 && codes[b].size(1) == (inputs / kVector + 1) / 2 * 2, "codes of shape ",
                codes[b].sizes(), " do not hold a weight of ", rows, " x ", inputs);
  }
  return w;
}

void product(const Vectors& w, const Tensor& x, const optional<Tensor>& bias, const Tensor& y) {
  check_dtype(x);
  const bool few = x.size(0) <= kFew;
  if (!x.size(0)) return;
  const Level& level = current_level();
  if (!few && !level.vectors->many) return by_slabs(level, w, x, bias, y);
  const Bias added(bias);
  if (few) by_registers(level, w, x, output_to(y, added));
  else by_tiles(level, *level.vectors, w, x, output_to(y, added));
}

}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("additive_linear(Tensor x, Tensor[] codes, Tensor[] tables, Tensor scale, Tensor? bias, int rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("additive_linear", &ptqbench::linear); }
