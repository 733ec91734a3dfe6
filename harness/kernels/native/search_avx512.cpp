// The search for additive codebooks for AVX-512.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "search.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
constexpr int kLanes = 16;
#include "common.h"
#include "beam.h"

struct V {
  static constexpr int tile = 16;  // vectors of sums in registers
  static ALWAYS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static ALWAYS_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
  static ALWAYS_INLINE float smallest(F a) { return _mm512_reduce_min_ps(a); }
};
}  // namespace

const SearchLevel& search_avx512() {
  static const SearchLevel level{search<V>, score<V>};
  return level;
}

}  // namespace ptqbench
