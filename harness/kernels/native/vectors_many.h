// y = x W^T for many rows of x and a weight of vectors, see product.h: vectors lie along the inputs of one row, so a
// tile is decoded row by row and transposed. For AVX-512.
#pragma once

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
void many_vectors(const Vectors& w, const Stacks<typename P::Word>& x, const Part& part, const Output& y) {
  const auto tile = [&](int64_t panel, int64_t k, int64_t end, uint8_t* memory) {
    decode_tile<P>(w, panel, k * P::pack / kVector, end * P::pack / kVector, memory);
    return memory;
  };
  multiply_part<P>(w.panels(), x, part, tile,
                   [&](int64_t m, int64_t panel, typename P::Sum sum) { write<V>(y, w.rows, m, panel, sum); });
}
