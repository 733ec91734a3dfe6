// The search for a trellis's path for AVX2.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "trellis.h"

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "viterbi.h"

struct V {
  static void choose(const float* costs, int64_t shared, int count, float* best, uint8_t* choices) {
    int64_t u = 0;
    for (; u + 8 <= shared; u += 8) {
      __m256 least = _mm256_loadu_ps(costs + u);
      __m256i choice = _mm256_setzero_si256();
      for (int j = 1; j < count; ++j) {
        const __m256 cost = _mm256_loadu_ps(costs + j * shared + u);
        const __m256 less = _mm256_cmp_ps(cost, least, _CMP_LT_OQ);
        least = _mm256_min_ps(cost, least);
        choice = _mm256_blendv_epi8(choice, _mm256_set1_epi32(j), _mm256_castps_si256(less));
      }
      _mm256_storeu_ps(best + u, least);
      const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(choice), _mm256_extracti128_si256(choice, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(choices + u), _mm_packus_epi16(words, words));
    }
    choose_plainly(costs, shared, count, best, choices, u);
  }
  template <int W>
  static void extend(const float* best, const float* values, const float* targets, int bits, int64_t states,
                     float* costs) {
    const __m256i lane = _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bits);
    for (int64_t s = 0; s < states; s += 8) {
      __m256 cost = _mm256_permutevar8x32_ps(_mm256_loadu_ps(best + (s >> bits)), lane);
      for (int w = 0; w < W; ++w) {
        const __m256 gap = _mm256_sub_ps(_mm256_set1_ps(targets[w]), _mm256_loadu_ps(values + w * states + s));
        cost = _mm256_add_ps(cost, _mm256_mul_ps(gap, gap));
      }
      _mm256_storeu_ps(costs + s, cost);
    }
  }
};
}  // namespace

const TrellisLevel& trellis_avx2() {
  static const TrellisLevel level{path<V>};
  return level;
}

}  // namespace ptqbench
