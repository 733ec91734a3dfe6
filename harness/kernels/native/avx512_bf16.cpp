// The kernels for AVX-512 with products of bytes and of bfloat16.
#include <cstdint>

#include "vectors.h"

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"
#include "vector_avx512.h"
#include "codes.h"
#include "parts.h"
#include "output.h"
#include "decode.h"
#include "product.h"
#include "points.h"
#include "transpose.h"
#include "vectors_many.h"

// Products in bfloat16 with sums in float32, see product.h: a word holds inputs k (low half) and k + 1.
struct BfloatProduct {
  using Word = uint32_t;
  using Sum = __m512;
  static constexpr int64_t pack = 2;
  static ALWAYS_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static ALWAYS_INLINE Sum broadcast(uint32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x))); }
  static ALWAYS_INLINE Sum load(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static ALWAYS_INLINE Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static ALWAYS_INLINE Sum dot(Sum sum, Sum weight, Sum x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(x));
  }

  // The words of 32 inputs of one row.
  static ALWAYS_INLINE Sum words(const float* inputs) {
    return reinterpret_cast<Sum>(_mm512_cvtne2ps_pbh(V::load(inputs + 16), V::load(inputs)));
  }

  // The inputs [first, last) of panel p, 64 bytes for each two of them.
  template <class Kind>
  static void decode(const Weight& w, int64_t p, int64_t first, int64_t last, uint8_t* tile) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 even = _mm512_setzero_ps();
    decode_panel<V, Kind>(w, p, first, last, [&](int64_t k, __m512 value) {
      if (k % 2 == 0) {
        even = value;
      } else {
        const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value, even));
        _mm512_storeu_si512(tile + (k - first) / 2 * 64, _mm512_permutexvar_epi16(interleave, halves));
      }
    });
  }
};
}  // namespace

const Level& avx512_bf16_level() {
  static const Level level = [] {
    Level copy = avx512_vnni_level();
    copy.name = "avx512_bf16";
    copy.many_bf16 = many<BfloatProduct>;
    static VectorLevel vectors = *copy.vectors;
    vectors.many_bf16 = many_vectors<BfloatProduct>;
    copy.vectors = &vectors;
    return copy;
  }();
  return level;
}

}  // namespace ptqbench
