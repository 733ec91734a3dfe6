// Products in bfloat16 with sums in float32, see product.h: a word holds inputs k (low half) and k + 1.
#pragma once

struct BfloatProduct {
  using Word = uint32_t;
  using Sum = __m512;
  using Multiplier = Registers<BfloatProduct>;
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
