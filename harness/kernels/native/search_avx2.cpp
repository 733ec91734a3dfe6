// The search for additive codes for AVX2 and FMA: a vector is two registers.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "search.h"

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"
#include "beam.h"

struct V {
  static constexpr int tile = 4;  // vectors of sums in registers
  struct Halves {
    __m256 a, b;
  };
  static ALWAYS_INLINE Halves halves(F x) {
    Halves y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
  static ALWAYS_INLINE F whole(Halves y) {
    F x;
    __builtin_memcpy(&x, &y, sizeof x);
    return x;
  }
  static ALWAYS_INLINE F fma(F x, F y, F z) {
    const Halves a = halves(x), b = halves(y), c = halves(z);
    return whole({_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)});
  }
  static ALWAYS_INLINE F smaller(F x, F y) {
    const Halves a = halves(x), b = halves(y);
    return whole({_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)});
  }
  static ALWAYS_INLINE float smallest(F x) {
    float least = x[0];
    for (int i = 1; i < 16; ++i) least = x[i] < least ? x[i] : least;
    return least;
  }
};
}  // namespace

const SearchLevel& search_avx2() {
  static const SearchLevel level{search<V>, score<V>};
  return level;
}

}  // namespace ptqbench
