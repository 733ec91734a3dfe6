// The search for additive codebooks for any processor.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "search.h"

namespace ptqbench {
namespace {
constexpr int kLanes = 4;
#include "common.h"
#include "beam.h"

struct V {
  static constexpr int tile = 1;  // vectors of sums in registers
  static ALWAYS_INLINE F fma(F a, F b, F c) {
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }
  static ALWAYS_INLINE F smaller(F a, F b) { return a < b ? a : b; }
  static ALWAYS_INLINE float smallest(F x) {
    float least = x[0];
    for (int i = 1; i < kLanes; ++i) least = x[i] < least ? x[i] : least;
    return least;
  }
};
}  // namespace

const SearchLevel& search_plain() {
  static const SearchLevel level{search<V>, score<V>};
  return level;
}

}  // namespace ptqbench
