// The search for additive codes for any processor.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "search.h"


namespace ptqbench {
namespace {
#include "common.h"
#include "beam.h"

struct V {
  static constexpr int tile = 1;  // vectors of sums in registers
  static ALWAYS_INLINE F fma(F x, F y, F z) {
    for (int i = 0; i < 16; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return z;
  }
  static ALWAYS_INLINE F smaller(F x, F y) {
    for (int i = 0; i < 16; ++i) x[i] = x[i] < y[i] ? x[i] : y[i];
    return x;
  }
  static ALWAYS_INLINE float smallest(F x) {
    float least = x[0];
    for (int i = 1; i < 16; ++i) least = x[i] < least ? x[i] : least;
    return least;
  }
};
}  // namespace

const SearchLevel& search_plain() {
  static const SearchLevel level{search<V>, score<V>};
  return level;
}

}  // namespace ptqbench
