// Matrices of words whose rows become columns. For AVX-512.
#pragma once

// The transpose of 16 x 16 words of 32 bits: pairs of rows, then of pairs, then quarters of registers.
ALWAYS_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto join = [](__m512 a, __m512 b, auto high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high.value ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  UNROLL for (int i = 0; i < 16; i += 4) {  // r[i + c]: column c of each quarter, rows i to i + 3
    r[i] = join(t[i], t[i + 2], Index<0>{});
    r[i + 1] = join(t[i], t[i + 2], Index<1>{});
    r[i + 2] = join(t[i + 1], t[i + 3], Index<0>{});
    r[i + 3] = join(t[i + 1], t[i + 3], Index<1>{});
  }
  UNROLL for (int c = 0; c < 4; ++c) {  // quarters of even and of odd index of two registers
    t[c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xDD);
    t[8 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xDD);
  }
  UNROLL for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0xDD);
    r[4 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0xDD);
  }
}

// The words of a stack of rows, kSteps of each, step by step.
inline void interleave(const uint32_t* rows, int64_t height, int64_t steps, uint32_t* out) {
  for (int64_t first = 0; first < steps; first += kPanel) {
    __m512 block[kPanel];
    for (int64_t r = 0; r < kPanel; ++r) block[r] = _mm512_loadu_ps(rows + min(r, height - 1) * kSteps + first);
    transpose(block);
    for (int64_t i = 0; i < min(kPanel, steps - first); ++i)
      _mm512_mask_storeu_ps(out + (first + i) * height, V::mask(height), block[i]);
  }
}
