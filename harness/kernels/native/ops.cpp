// The torch operators: they check tensors, prepare the inputs, and share the panels among torch's threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "call.h"
#include "digit_products.h"
#include "level.h"
#include "tiles.h"
#include "weight.h"

namespace ptqbench {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kSlab = 32;  // panels of a slab: 4 MiB of float32 at K = 2048

Scale scale_type(const Tensor& scale) {
  switch (scale.scalar_type()) {
    case at::kFloat: return Scale::float32;
    case at::kHalf: return Scale::float16;
    case at::kBFloat16: return Scale::bfloat16;
    default: TORCH_CHECK(false, "scale has dtype ", scale.scalar_type(), "; expected float32, float16 or bfloat16");
  }
}

// Codes of more than 5 bits are integers, or floats; the levels of others may be integers.
void find_integers(Weight& w) {
  if (w.exponent) return;
  w.lowest = w.bits > 5 ? static_cast<float>(-(1 << (w.bits - 1))) : w.levels[0];
  w.integers = true;
  for (int code = 0; w.bits <= 5 && code < 1 << w.bits; ++code)
    w.integers = w.integers && w.levels[code] == w.lowest + static_cast<float>(code);
}

Weight weight_of(const Tensor& codes, const Tensor& levels, const Tensor& scale, const optional<Tensor>& zero,
                 int64_t exponent, int64_t rows, int64_t inputs) {
  const Panels panels = panels_of(codes, rows, inputs);
  const int bits = panels.bits;
  TORCH_CHECK(bits >= 2 && bits <= 8 && bits != 7, "codes have ", bits, " bits; expected 2 to 6, or 8");
  TORCH_CHECK(scale.dim() == 3 && scale.is_contiguous() && scale.size(0) == codes.size(0) && scale.size(2) == kPanel,
              "scale has shape ", scale.sizes(), "; expected (panels, groups, 16)");
  TORCH_CHECK(!zero || (zero->sizes() == scale.sizes() && zero->is_contiguous() &&
                        zero->scalar_type() == scale.scalar_type()),
              "zero must have the shape and dtype of scale");
  TORCH_CHECK(levels.scalar_type() == at::kFloat && levels.is_contiguous() && levels.numel() >= (bits == 5 ? 32 : 16),
              "levels must be 16 float32, or 32 for 5 bits");
  TORCH_CHECK(exponent == 0 || (bits == 6 && (exponent == 2 || exponent == 3)) ||
                  (bits == 8 && (exponent == 4 || exponent == 5)),
              "codes of ", bits, " bits have ", exponent, " bits of exponent; expected 2 or 3 of 6, 4 or 5 of 8, or 0");
  Weight w{panels,
           levels.const_data_ptr<float>(),
           static_cast<int>(exponent),
           scale.const_data_ptr(),
           zero ? zero->const_data_ptr() : nullptr,
           scale_type(scale),
           scale.size(1),
           0,
           false,
           0};
  find_integers(w);
  w.group = w.groups == 1 ? w.halves() * kHalf : inputs / w.groups;
  TORCH_CHECK(w.group % kHalf == 0 && (w.groups == 1 || w.group * w.groups == inputs), "groups of ", w.group,
              " inputs; expected a multiple of 16 that divides ", inputs);
  return w;
}

// Sums of x over the groups of w, (rows, groups).
std::vector<float> group_sums(const Weight& w, const Rows& x) {
  std::vector<float> sums(x.count * w.groups);
  for (int64_t i = 0; i < x.count * w.groups; ++i) {
    const float* values = x.values + i / w.groups * x.stride + i % w.groups * w.group;
    float lanes[kHalf] = {};
    for (int64_t k = 0; k < w.group; k += kHalf)
      for (int lane = 0; lane < kHalf; ++lane) lanes[lane] += values[k + lane];
    for (float lane : lanes) sums[i] += lane;
  }
  return sums;
}

// Few rows of x: codes are decoded in registers.
void by_registers(const Level& level, const Weight& w, const Tensor& x, const Output& y) {
  const Rows rows = rows_of(x);
  if (level.few_digits && w.integers && by_few_digits(level, w, rows, digits_of(x), y)) return;
  const std::vector<float> sums = w.zero ? group_sums(w, rows) : std::vector<float>();
  at::parallel_for(0, w.panels(), grain(w, rows.count),
                   [&](int64_t first, int64_t last) { level.few(w, rows, sums.data(), y, first, last); });
}

template <class T, class Decode>
void decode_slab(Decode decode, const Weight& w, int64_t first, int64_t last, const Tensor& slab) {
  T* values = static_cast<T*>(slab.mutable_data_ptr());
  at::parallel_for(first, last, 1, [&](int64_t from, int64_t to) {
    decode(w, from, to, Slab<T>{values + (from - first) * kPanel, slab.size(1)});
  });
}

// Many rows of x where torch's product is the faster one: slabs of W^T are decoded in the dtype of x.
Tensor by_slabs(const Level& level, const Weight& w, const Tensor& x, const optional<Tensor>& bias) {
  Tensor y = at::empty({x.size(0), w.panels() * kPanel}, x.options());
  for (int64_t first = 0; first < w.panels(); first += kSlab) {
    const int64_t last = std::min(first + kSlab, w.panels());
    Tensor slab = at::empty({w.inputs, (last - first) * kPanel}, x.options());
    if (x.scalar_type() == at::kFloat) decode_slab<float>(level.decode, w, first, last, slab);
    else decode_slab<uint16_t>(level.decode_bf16, w, first, last, slab);
    Tensor part = y.slice(1, first * kPanel, last * kPanel);
    at::mm_out(part, x, slab);
  }
  y = y.slice(1, 0, w.rows);
  return bias ? y + *bias : y.contiguous();
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& levels, const Tensor& scale,
              const optional<Tensor>& zero, const optional<Tensor>& bias, int64_t exponent, int64_t rows) {
  check_dtype(x);
  const Weight w = weight_of(codes, levels, scale, zero, exponent, rows, x.size(-1));
  const Level& level = current_level();
  const Tensor flat = as_matrix(x), y = outputs_for(x, rows);
  if (!flat.size(0)) return y;
  const Bias added(bias);
  const Output out = output_to(y, added);
  if (many_digits_pay(level, w, flat) && by_many_digits(level, w, flat, digits_of(flat), out)) return y;
  if (flat.size(0) <= kFew) by_registers(level, w, flat, out);
  else if (!level.many) return by_slabs(level, w, flat, bias).view(y.sizes());
  else by_tiles(level, level, w, flat, out);
  return y;
}

std::string level_name() { return current_level().name; }

std::string set_level(const std::string& name) {
  limit_level(name);
  return level_name();
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY(ptqbench_native, m) {
  m.def(
      "grouped_linear(Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? zero, Tensor? bias, int exponent, "
      "int rows) -> Tensor");
  m.def("set_level(str name) -> str", &ptqbench::set_level);
  m.def("level() -> str", &ptqbench::level_name);
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("grouped_linear", &ptqbench::linear); }
