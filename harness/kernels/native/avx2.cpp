// The kernels for AVX2, FMA and F16C: a vector is two registers.
#include <cstdint>
#include <cstring>

#include "search.h"
#include "trellis.h"
#include "vectors.h"

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"

struct V {
  static constexpr bool registers = true;  // whether several sums stay in registers
  static constexpr int tall = 2;           // rows of x that are multiplied together: 4 sums of 2 of 16 registers
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static ALWAYS_INLINE __m256i words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static ALWAYS_INLINE __m128i shorts(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static ALWAYS_INLINE I load(const uint8_t* p) { return {words(p), words(p + 32)}; }
  static ALWAYS_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static ALWAYS_INLINE F load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(shorts(p)), _mm256_cvtph_ps(shorts(p + 8))};
  }
  static ALWAYS_INLINE __m256 bfloat(__m128i p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(p), 16));
  }
  static ALWAYS_INLINE F load_bfloat(const uint16_t* p) { return {bfloat(shorts(p)), bfloat(shorts(p + 8))}; }
  static ALWAYS_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static ALWAYS_INLINE void store(float* p, F x, int64_t count) {
    float lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(4 * count));
  }
  static ALWAYS_INLINE void store(uint16_t* p, F x, int64_t count) {
    uint16_t lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(2 * count));
  }
  static ALWAYS_INLINE F load(const float* p, int64_t count) {
    float lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(4 * count));
    return load(lanes);
  }
  static ALWAYS_INLINE __m256i rounded(__m256 x) {  // the bits of bfloat16, to nearest even, in the low half of a word
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  }
  static ALWAYS_INLINE void store(uint16_t* p, F x) {
    const __m256i packed = _mm256_packus_epi32(rounded(x.a), rounded(x.b));  // by halves of registers: a b a b
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  template <int s>
  static ALWAYS_INLINE I right(I x) {
    return {_mm256_srli_epi32(x.a, s), _mm256_srli_epi32(x.b, s)};
  }
  template <int s>
  static ALWAYS_INLINE I left(I x) {
    return {_mm256_slli_epi32(x.a, s), _mm256_slli_epi32(x.b, s)};
  }
  template <int s>
  static ALWAYS_INLINE I arithmetic(I x) {
    return {_mm256_srai_epi32(x.a, s), _mm256_srai_epi32(x.b, s)};
  }
  static ALWAYS_INLINE I either(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <uint32_t mask>
  static ALWAYS_INLINE I merge(I x, I y) {  // the bits of the mask from x, the others from y
    const __m256i bits = _mm256_set1_epi32(static_cast<int32_t>(mask));
    return either(both(x, {bits, bits}), {_mm256_andnot_si256(bits, y.a), _mm256_andnot_si256(bits, y.b)});
  }
  static ALWAYS_INLINE __m256 choose(__m256 low, __m256 high, __m256i index, int bit) {
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - bit)));
  }
  static ALWAYS_INLINE __m256 of_16(F table, __m256i index) {
    return choose(_mm256_permutevar8x32_ps(table.a, index), _mm256_permutevar8x32_ps(table.b, index), index, 3);
  }
  static ALWAYS_INLINE F lookup(F table, I index) { return {of_16(table, index.a), of_16(table, index.b)}; }
  static ALWAYS_INLINE F lookup(F low, F high, I index) {
    return {choose(of_16(low, index.a), of_16(high, index.a), index.a, 4),
            choose(of_16(low, index.b), of_16(high, index.b), index.b, 4)};
  }
  static ALWAYS_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  template <int s>
  static ALWAYS_INLINE I left_of_16(I x) {  // of 32 lanes of 16 bits
    return {_mm256_slli_epi16(x.a, s), _mm256_slli_epi16(x.b, s)};
  }
  template <int s>
  static ALWAYS_INLINE I arithmetic_of_16(I x) {
    return {_mm256_srai_epi16(x.a, s), _mm256_srai_epi16(x.b, s)};
  }
  template <int part>
  static ALWAYS_INLINE F widened(I halves) {  // 16 of 32 float16
    const __m256i x = part ? halves.b : halves.a;
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  }
  static ALWAYS_INLINE F zero() { return broadcast(0); }
  static ALWAYS_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static ALWAYS_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static ALWAYS_INLINE F fnma(F x, F y, F z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
  }
  static ALWAYS_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F larger(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F smaller(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static ALWAYS_INLINE F magnitude(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static ALWAYS_INLINE F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static ALWAYS_INLINE void store_bytes(int8_t* p, F x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
  }
  static ALWAYS_INLINE void store(uint8_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
  }
  static ALWAYS_INLINE I integer(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static ALWAYS_INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static ALWAYS_INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static ALWAYS_INLINE I times(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static ALWAYS_INLINE I both(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static ALWAYS_INLINE I shifted(I x, int s) {
    const __m128i count = _mm_cvtsi32_si128(s);
    return {_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
  }
  static ALWAYS_INLINE __m256i dot(__m256i weight, __m256i x) {
    const __m256i even = _mm256_and_si256(weight, _mm256_set1_epi32(0x00FF00FF)), odd = _mm256_srli_epi16(weight, 8);
    return _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)),
                            _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8)));
  }
  // Adds the products of four bytes, those of the weight without a sign, to the sum of each lane.
  static ALWAYS_INLINE I dot4(I sum, I weight, I x) { return add(sum, {dot(weight.a, x.a), dot(weight.b, x.b)}); }
  // Eight values at p and eight at q.
  static ALWAYS_INLINE F pair(const float* p, const float* q) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(q)}; }
  static ALWAYS_INLINE F pair(const uint16_t* p, const uint16_t* q) {  // float16
    return {_mm256_cvtph_ps(shorts(p)), _mm256_cvtph_ps(shorts(q))};
  }
  static ALWAYS_INLINE __m128i eight(const int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static ALWAYS_INLINE __m256 with_signs(__m128i magnitudes, __m128i signs) {
    const __m128i shift = _mm_sub_epi8(_mm_set1_epi8(2), _mm_abs_epi8(signs));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_add_epi8(_mm_sign_epi8(magnitudes, signs), shift)));
  }
  // The points of E8P of eight magnitudes at p and eight at q, see Points.
  static ALWAYS_INLINE F signed_pair(const int8_t* p, const int8_t* q, const int8_t* p_signs, const int8_t* q_signs) {
    return {with_signs(eight(p), eight(p_signs)), with_signs(eight(q), eight(q_signs))};
  }
  static ALWAYS_INLINE float total(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  template <int step>
  static ALWAYS_INLINE F swapped(F x) {  // lane i becomes lane i ^ step
    if constexpr (step == 1) return {_mm256_permute_ps(x.a, 0xB1), _mm256_permute_ps(x.b, 0xB1)};
    else if constexpr (step == 2) return {_mm256_permute_ps(x.a, 0x4E), _mm256_permute_ps(x.b, 0x4E)};
    else if constexpr (step == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    else return {x.b, x.a};
  }
};

#include "codes.h"
#include "parts.h"
#include "output.h"
#include "few.h"
#include "dense.h"
#include "decode.h"
#include "product.h"
#include "bytes.h"
#include "points.h"
#include "vectors_few.h"
#include "hadamard.h"
#include "basis.h"
}  // namespace

const Level& avx2_level() {
  static const VectorLevel vectors = vector_basis<V>();
  static const Level level = basis<V>("avx2", vectors, search_avx2(), trellis_avx2());
  return level;
}

}  // namespace ptqbench
