// The search for additive codebooks for AVX2 and FMA.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "search.h"

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
constexpr int kLanes = 8;
#include "common.h"
#include "beam.h"

struct V {
  static constexpr int tile = 8;  // vectors of sums in registers
  static ALWAYS_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static ALWAYS_INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
  static ALWAYS_INLINE float smallest(F a) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
  }
};
}  // namespace

const SearchLevel& search_avx2() {
  static const SearchLevel level{search<V>, score<V>};
  return level;
}

}  // namespace ptqbench
