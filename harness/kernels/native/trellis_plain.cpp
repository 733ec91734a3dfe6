// The search for a trellis's path for any processor.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "trellis.h"

namespace ptqbench {
namespace {
#include "viterbi.h"

struct V {
  static void choose(const float* costs, int64_t shared, int count, float* best, uint8_t* choices) {
    choose_plainly(costs, shared, count, best, choices, 0);
  }
  template <int W>
  static void extend(const float* best, const float* values, const float* targets, int bits, int64_t states,
                     float* costs) {
    for (int64_t s = 0; s < states; ++s) costs[s] = gap_of<W>(values, states, s, targets, best[s >> bits]);
  }
};
}  // namespace

const TrellisLevel& trellis_plain() {
  static const TrellisLevel level{path<V>};
  return level;
}

}  // namespace ptqbench
