// A vector of 16 lanes in one AVX-512 register.
#pragma once

struct V {
  static constexpr bool registers = true;  // whether several sums stay in registers
  static constexpr int tall = 12;          // rows of x that are multiplied together: 24 sums of 32 registers
  using F = __m512;
  using I = __m512i;
  static ALWAYS_INLINE I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static ALWAYS_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static ALWAYS_INLINE F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static ALWAYS_INLINE F load_bfloat(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static ALWAYS_INLINE F load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(mask(count), p); }
  static ALWAYS_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static ALWAYS_INLINE void store(float* p, F a, int64_t count) { _mm512_mask_storeu_ps(p, mask(count), a); }
  static ALWAYS_INLINE __mmask16 mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static ALWAYS_INLINE __m256i bfloat(F a) {  // rounded to nearest even
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static ALWAYS_INLINE void store(uint16_t* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat(a)); }
  static ALWAYS_INLINE void store(uint16_t* p, F a, int64_t count) {
    _mm256_mask_storeu_epi16(p, mask(count), bfloat(a));
  }
  template <int s>
  static ALWAYS_INLINE I right(I a) {
    return s ? _mm512_srli_epi32(a, s) : a;
  }
  template <int s>
  static ALWAYS_INLINE I left(I a) {
    return s ? _mm512_slli_epi32(a, s) : a;
  }
  template <int s>
  static ALWAYS_INLINE I arithmetic(I a) {
    return _mm512_srai_epi32(a, s);
  }
  static ALWAYS_INLINE I either(I a, I b) { return _mm512_or_si512(a, b); }
  template <uint32_t mask>
  static ALWAYS_INLINE I merge(I a, I b) {  // the bits of the mask from a, the others from b
    return _mm512_ternarylogic_epi32(integer(static_cast<int32_t>(mask)), a, b, 0xCA);
  }
  static ALWAYS_INLINE F lookup(F table, I index) { return _mm512_permutexvar_ps(index, table); }
  static ALWAYS_INLINE F lookup(F low, F high, I index) { return _mm512_permutex2var_ps(low, index, high); }
  static ALWAYS_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  template <int s>
  static ALWAYS_INLINE I left_of_16(I a) {  // of 32 lanes of 16 bits
    return s ? _mm512_slli_epi16(a, s) : a;
  }
  template <int s>
  static ALWAYS_INLINE I arithmetic_of_16(I a) {
    return s ? _mm512_srai_epi16(a, s) : a;
  }
  template <int part>
  static ALWAYS_INLINE F widened(I halves) {  // 16 of 32 float16
    return _mm512_cvtph_ps(part ? _mm512_extracti64x4_epi64(halves, 1) : _mm512_castsi512_si256(halves));
  }
  static ALWAYS_INLINE F zero() { return _mm512_setzero_ps(); }
  static ALWAYS_INLINE F broadcast(float a) { return _mm512_set1_ps(a); }
  static ALWAYS_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static ALWAYS_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static ALWAYS_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static ALWAYS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static ALWAYS_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static ALWAYS_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static ALWAYS_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
  static ALWAYS_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
  static ALWAYS_INLINE F magnitude(F a) { return _mm512_abs_ps(a); }
  static ALWAYS_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static ALWAYS_INLINE void store_bytes(int8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
  }
  static ALWAYS_INLINE I to_integer(F a) { return _mm512_cvtps_epi32(a); }  // rounded to nearest even
  static ALWAYS_INLINE void store_bytes(int8_t* p, I a) {                   // the lowest byte of each lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static ALWAYS_INLINE void store(uint8_t* p, I a) { _mm512_storeu_si512(p, a); }
  static ALWAYS_INLINE I integer(int32_t a) { return _mm512_set1_epi32(a); }
  static ALWAYS_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static ALWAYS_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static ALWAYS_INLINE I times(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static ALWAYS_INLINE I different(I a, I b) { return _mm512_xor_si512(a, b); }
  static ALWAYS_INLINE I both(I a, I b) { return _mm512_and_si512(a, b); }
  static ALWAYS_INLINE I shifted(I a, int s) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(s)); }
  // Adds the products of four bytes, those of the weight without a sign, to the sum of each lane.
  static ALWAYS_INLINE I dot4(I sum, I weight, I x) {
#ifdef PTQBENCH_VNNI
    return _mm512_dpbusd_epi32(sum, weight, x);
#else
    const I even = _mm512_madd_epi16(both(weight, integer(0x00FF00FF)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const I odd = _mm512_madd_epi16(_mm512_srli_epi16(weight, 8), _mm512_srai_epi16(x, 8));
    return add(sum, add(even, odd));
#endif
  }
  // Eight values at a and eight at b.
  static ALWAYS_INLINE F pair(const float* a, const float* b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
  }
  static ALWAYS_INLINE F pair(const uint16_t* a, const uint16_t* b) {  // float16
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1));
  }
  static ALWAYS_INLINE __m128i bytes(const int8_t* a, const int8_t* b) {
    const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
    return _mm_castps_si128(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(b)));
  }
  // The points of E8P of eight magnitudes at a and eight at b, see Points.
  static ALWAYS_INLINE F signed_pair(const int8_t* a, const int8_t* b, const int8_t* a_signs, const int8_t* b_signs) {
    const __m128i signs = bytes(a_signs, b_signs), shift = _mm_sub_epi8(_mm_set1_epi8(2), _mm_abs_epi8(signs));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_add_epi8(_mm_sign_epi8(bytes(a, b), signs), shift)));
  }
  static ALWAYS_INLINE float total(F a) { return _mm512_reduce_add_ps(a); }
  static ALWAYS_INLINE int32_t total(I a) { return _mm512_reduce_add_epi32(a); }
  static ALWAYS_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
  template <int step>
  static ALWAYS_INLINE F swapped(F a) {  // lane i becomes lane i ^ step
    if constexpr (step == 1) return _mm512_permute_ps(a, 0xB1);
    else if constexpr (step == 2) return _mm512_permute_ps(a, 0x4E);
    else return _mm512_shuffle_f32x4(a, a, step == 4 ? 0xB1 : 0x4E);
  }
};
