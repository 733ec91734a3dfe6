// The search for a trellis's path for AVX-512.
#pragma GCC optimize("fp-contract=off")
#include <cstdint>

#include "trellis.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "viterbi.h"

struct V {
  static void choose(const float* costs, int64_t shared, int count, float* best, uint8_t* choices) {
    int64_t u = 0;
    for (; u + 16 <= shared; u += 16) {
      __m512 least = _mm512_loadu_ps(costs + u);
      __m512i choice = _mm512_setzero_si512();
      for (int j = 1; j < count; ++j) {
        const __m512 cost = _mm512_loadu_ps(costs + j * shared + u);
        const __mmask16 less = _mm512_cmp_ps_mask(cost, least, _CMP_LT_OQ);
        least = _mm512_min_ps(cost, least);
        choice = _mm512_mask_set1_epi32(choice, less, j);
      }
      _mm512_storeu_ps(best + u, least);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(choices + u), _mm512_cvtepi32_epi8(choice));
    }
    choose_plainly(costs, shared, count, best, choices, u);
  }
  template <int W>
  static void extend(const float* best, const float* values, const float* targets, int bits, int64_t states,
                     float* costs) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lane = _mm512_srli_epi32(lanes, bits);
    for (int64_t s = 0; s < states; s += 16) {
      __m512 cost = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(best + (s >> bits)));
      for (int w = 0; w < W; ++w) {
        const __m512 gap = _mm512_sub_ps(_mm512_set1_ps(targets[w]), _mm512_loadu_ps(values + w * states + s));
        cost = _mm512_add_ps(cost, _mm512_mul_ps(gap, gap));
      }
      _mm512_storeu_ps(costs + s, cost);
    }
  }
};
}  // namespace

const TrellisLevel& trellis_avx512() {
  static const TrellisLevel level{path<V>};
  return level;
}

}  // namespace ptqbench
