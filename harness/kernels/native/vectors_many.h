// y = x W^T for many rows of x and a weight of vectors, see product.h: vectors lie along the inputs of one row, so a
// tile is decoded row by row and transposed. For AVX-512.
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

// The vectors [first, last) of the 16 rows of panel p in words of P, 64 bytes a word; at most kSteps words.
template <class P>
void decode_tile(const Vectors& w, int64_t p, int64_t first, int64_t last, uint8_t* tile) {
  constexpr int64_t inputs = kSteps * P::pack;
  alignas(64) float values[kPanel][inputs];
  for (int64_t r = 0; r < kPanel; ++r) decode_row<V>(w, min(p * kPanel + r, w.rows - 1), first, last, values[r]);
  for (int64_t k = 0; k < (last - first) * kVector; k += kPanel * P::pack) {
    __m512 block[kPanel];
    UNROLL for (int r = 0; r < kPanel; ++r) block[r] = P::words(values[r] + k);
    transpose(block);
    UNROLL for (int i = 0; i < kPanel; ++i) _mm512_store_ps(tile + (k / P::pack + i) * 64, block[i]);
  }
}

template <class P>
void many_vectors(const Vectors& w, const Rows<typename P::Word>& x, const Output& y, int64_t first, int64_t last) {
  const auto tile = [&](int64_t panel, int64_t k, int64_t end, uint8_t* memory) {
    decode_tile<P>(w, panel, k * P::pack / kVector, end * P::pack / kVector, memory);
    return memory;
  };
  multiply_pairs<P>(w.panels(), w.stride * kVector / P::pack, x, first, last, tile,
                    [&](int64_t m, int64_t panel, typename P::Sum sum) { write<V>(y, w.rows, m, panel, sum); });
}
