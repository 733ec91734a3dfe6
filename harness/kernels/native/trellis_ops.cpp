// The torch operators of bitshift trellises: the search for a path, and the values along one.
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

int bits_of(int64_t states) {
  int bits = 0;
  while (int64_t{1} << bits < states) ++bits;
  return bits;
}

// The states (B, length) int32 of the paths nearest to targets (B, length, W), for states with values (W, 2^L);
// overlap (B,) int32, -1 for a free path.
Tensor trellis_path(const Tensor& targets, const Tensor& values, int64_t bits, const Tensor& overlap) {
  const int64_t paths = targets.size(0), length = targets.size(1), width = values.size(0), count = values.size(1);
  TORCH_CHECK(width == 1 || width == 2, width, " values of a state; expected 1 or 2");
  const int state_bits = bits_of(count);
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

constexpr int64_t kGrain = 16;  // paths that are decoded on one thread, at least

// The states (steps,) of a circle of `steps` codes, which follow one another in `bytes` from the lowest bit on.
void circle(const uint8_t* bytes, int64_t steps, int bits, int state_bits, int32_t* states) {
  const int32_t mask = (1 << state_bits) - 1, one = (1 << bits) - 1;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t bit = i * bits, byte = bit >> 3;
    const int low = bytes[byte], high = (bit & 7) + bits > 8 ? bytes[byte + 1] : 0;
    states[i] = ((high << 8 | low) >> (bit & 7)) & one;
  }
  int32_t state = 0;  // before the first step, it has the codes of the last ones
  for (int64_t i = steps - (state_bits + bits - 1) / bits; i < steps; ++i) state = state << bits | states[i];
  for (int64_t i = 0; i < steps; ++i) states[i] = state = (state << bits | states[i]) & mask;
}

// The values (B, W steps) of closed paths, circles of bits (B, bytes) with `bits` a step, for states with values
// (W, 2^L).
Tensor trellis_decode(const Tensor& packed, const Tensor& values, int64_t bits) {
  const int64_t paths = packed.size(0), bytes = packed.size(1), width = values.size(0), count = values.size(1);
  const int64_t steps = 8 * bytes / bits;
  const int state_bits = bits_of(count);
  TORCH_CHECK(0 < bits && bits <= 8 && state_bits <= 24 && steps * bits == 8 * bytes && steps * bits >= state_bits + 8,
              bytes, " bytes are no circle of ", bits, " bits a step for ", count, " states");
  const uint8_t* in = values_in<uint8_t>(packed, {paths, bytes}, "packed");
  const float* table = values_in<float>(values, {width, count}, "values");
  const Tensor decoded = at::empty({paths, width * steps}, values.options());
  float* out = decoded.mutable_data_ptr<float>();
  at::parallel_for(0, paths, kGrain, [&](int64_t first, int64_t last) {
    std::vector<int32_t> states(steps);
    for (int64_t p = first; p < last; ++p) {
      circle(in + p * bytes, steps, static_cast<int>(bits), state_bits, states.data());
      float* to = out + p * width * steps;
      for (int64_t w = 0; w < width; ++w)
        for (int64_t i = 0; i < steps; ++i) to[i * width + w] = table[w * count + states[i]];
    }
  });
  return decoded;
}

}  // namespace
}  // namespace ptqbench

TORCH_LIBRARY_FRAGMENT(ptqbench_native, m) {
  m.def("trellis_path(Tensor targets, Tensor values, int bits, Tensor overlap) -> Tensor");
  m.def("trellis_decode(Tensor packed, Tensor values, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptqbench_native, CPU, m) {
  m.impl("trellis_path", &ptqbench::trellis_path);
  m.impl("trellis_decode", &ptqbench::trellis_decode);
}
