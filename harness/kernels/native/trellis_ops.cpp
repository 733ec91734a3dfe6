// The torch operator that searches the path through a bitshift trellis.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "level.h"
#include "trellis.h"

namespace ptqbench {
namespace {

using at::Tensor;

// The states (B, length) int32 of the paths nearest to targets (B, length, W), for states with values (W, 2^L);
// overlap (B,) int32, -1 for a free path.
Tensor trellis_path(const Tensor& targets, const Tensor& values, int64_t bits, const Tensor& overlap) {
  const int64_t paths = targets.size(0), length = targets.size(1), width = values.size(0), count = values.size(1);
  TORCH_CHECK(width == 1 || width == 2, width, " values of a state; expected 1 or 2");
  int state_bits = 0;
  while (int64_t{1} << state_bits < count) ++state_bits;
  TORCH_CHECK(int64_t{1} << state_bits == count && state_bits >= 4 && 0 < bits && bits <= 8 && bits < state_bits, count,
              " states and ", bits, " bits a step; expected a power of two of 16 or more, and fewer bits");
  const float* table = values_in<float>(values, {width, count}, "values");
  const Trellis t{static_cast<int>(bits), state_bits, static_cast<int>(width), table};
  const float* x = values_in<float>(targets, {paths, length, width}, "targets");
  const int32_t* o = values_in<int32_t>(overlap, {paths}, "overlap");
  const Tensor states = at::empty({paths, length}, overlap.options());
  int32_t* out = states.mutable_data_ptr<int32_t>();
  at::parallel_for(0, paths, 1, [&](int64_t first, int64_t last) {
    std::vector<float> floats(trellis_floats(t));
    std::vector<uint8_t> choices(trellis_choices(t, length));
    for (int64_t i = first; i < last; ++i)
      current_level().trellis->path(t, x + i * length * width, length, o[i], out + i * length, floats.data(),
                                    choices.data());
  });
  return states;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("trellis_path(Tensor targets, Tensor values, int bits, Tensor overlap) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) { m.impl("trellis_path", &ptqbench::trellis_path); }
