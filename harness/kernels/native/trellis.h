// The search for the path through a bitshift trellis: what the levels of processor features share with its operator.
#pragma once
#include <cstdint>

namespace ptqbench {

// A trellis of 2^state_bits states with `width` values each; a step shifts `bits` new bits into the state.
struct Trellis {
  int bits, state_bits, width;
  const float* values;  // (width, 2^state_bits)
};

struct TrellisLevel {
  // The states (length,) of the path whose values are nearest to the targets (length, width). With `overlap` >= 0, the
  // path is a circle: these are the upper bits of its first state and the lower bits of its last. Memory:
  // `trellis_floats` floats, and a byte for each of `trellis_choices`.
  void (*path)(const Trellis&, const float* targets, int64_t length, int32_t overlap, int32_t* states, float* floats,
               uint8_t* choices);
};

inline int64_t trellis_states(const Trellis& t) { return int64_t{1} << t.state_bits; }
inline int64_t trellis_shared(const Trellis& t) { return trellis_states(t) >> t.bits; }
inline int64_t trellis_floats(const Trellis& t) { return trellis_states(t) + trellis_shared(t) + 16; }
inline int64_t trellis_choices(const Trellis& t, int64_t length) { return length * trellis_shared(t); }

const TrellisLevel& trellis_plain();
const TrellisLevel& trellis_avx2();
const TrellisLevel& trellis_avx512();

}  // namespace ptqbench
