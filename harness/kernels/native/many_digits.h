// y = x W^T for many rows of x and integer codes, by products of bytes, see digits.h: the digits of a row are
// multiplied like rows of their own, and the sums of a chunk, exact integers, are brought to its unit and scale.
//
//   y[m, n] = sum over chunks c of scale[n, c] unit[m, c] (sum_d 256^d sum_k code[n, k] digit_d[m, k]
//                                                          + offset[n, c] sum[m, c])
//
// where `sum` is that of the chunk's inputs in units, and `offset` what is added to a code without a sign.
#pragma once

constexpr int64_t kChunkWords = kChunk / 4, kChunks = kSteps / kChunkWords;  // words of a chunk, chunks of a tile

// A tile of two panels: codes, and the scales and offsets of its chunks.
struct DigitTile {
  alignas(64) uint8_t codes[2][64 * kSteps];
  V::F scale[kChunks][2], offset[kChunks][2];
};

template <int bits, int... four>
ALWAYS_INLINE void decode_bytes(const uint8_t* block, uint8_t* out, Indices<four...>) {
  (V::store(out + four * 64, code_bytes<V, bits, four>(block)), ...);
}

// The words [k, end) of panel p.
template <int bits>
void fill(const Weight& w, int64_t p, int64_t k, int64_t end, int i, DigitTile& tile) {
  for (int64_t word = k; word < end; word += kBlock / 4) {
    const uint8_t* block = w.panel(p) + word / 8 * bits * 64;
    prefetch_pair<bits>(w, block);
    decode_bytes<bits>(block, tile.codes[i] + (word - k) * 64, Indices<0, 1, 2, 3, 4, 5, 6, 7>{});
  }
  for (int64_t c = 0; c * kChunkWords < end - k; ++c) {
    const int64_t at = (p * w.groups + (k * 4 + c * kChunk) / w.group) * kPanel;
    tile.scale[c][i] = load_scale<V>(w.scale, w.scale_type, at);
    tile.offset[c][i] = load_offset<V>(w, at);
  }
}

// V::dot4. With the intrinsic, GCC 12 keeps the sums of a chunk in memory, which halves the speed.
ALWAYS_INLINE void add_dot4(V::I& sum, V::I weight, V::I x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
}

template <int D>
ALWAYS_INLINE V::F joined_digits(const V::I (*sums)[2], int i) {
  if constexpr (D == 2) return joined<V>(sums[0][i], sums[1][i]);
  else return joined<V>(sums[0][i], sums[1][i], sums[2][i]);
}

// `total` and the products of a row and panel i in chunk c, which are in units of the row.
ALWAYS_INLINE V::F scaled(const DigitTile& tile, int64_t c, int i, float unit, float sum, V::F products, V::F total) {
  const V::F value = V::fma(tile.offset[c][i], V::broadcast(sum), products);
  return V::fma(value, V::mul(tile.scale[c][i], V::broadcast(unit)), total);
}

// The sums of a stack of M rows of x in D digits and a tile of `steps` words; added to y (M, 2) unless they are the
// first. `units` and `sums` of the rows lie `stride` apart from chunk to chunk.
template <int D, int M>
void multiply_digits(const DigitTile& tile, int64_t steps, const uint32_t* x, const float* units, const float* sums,
                     int64_t stride, V::F* y, bool first) {
  for (int m = 0; first && m < 2 * M; ++m) y[m] = V::zero();
  for (int64_t c = 0; c * kChunkWords < steps; ++c, units += stride, sums += stride) {
    V::I digits[D * M][2];
    UNROLL for (int i = 0; i < D * M; ++i) digits[i][0] = digits[i][1] = V::integer(0);
    const int64_t end = min((c + 1) * kChunkWords, steps);
    for (int64_t k = c * kChunkWords; k < end; ++k, x += D * M) {
      const V::I left = V::load(tile.codes[0] + 64 * k), right = V::load(tile.codes[1] + 64 * k);
      UNROLL for (int i = 0; i < D * M; ++i) {
        const V::I value = V::integer(static_cast<int32_t>(x[i]));
        add_dot4(digits[i][0], left, value);
        add_dot4(digits[i][1], right, value);
      }
    }
    UNROLL for (int m = 0; m < M; ++m) {
      UNROLL for (int i = 0; i < 2; ++i) y[2 * m + i] =
          scaled(tile, c, i, units[m], sums[m], joined_digits<D>(digits + D * m, i), y[2 * m + i]);
    }
  }
}

using MultiplyDigits = void (*)(const DigitTile&, int64_t, const uint32_t*, const float*, const float*, int64_t, V::F*,
                                bool);

template <int D, int M = V::tall / D>
MultiplyDigits multiply_digit_rows(int64_t rows) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_digit_rows<D, M - 1>(rows);
  }
  return multiply_digits<D, M>;
}

template <int D>
struct DigitRegisters {
  void multiply(int64_t rows, const DigitTile& tile, int64_t steps, const uint32_t* x, const float* units,
                const float* sums, int64_t stride, V::F* y, bool first) const {
    multiply_digit_rows<D>(rows)(tile, steps, x, units, sums, stride, y, first);
  }
};

template <int bits, class Multiplier>
void multiply_digit_part(const Weight& w, const DigitStacks& x, const Part& part, V::F* totals) {
  DigitTile tile;
  Multiplier multiplier;
  const int64_t count = x.words.count;
  for (int64_t t = part.first; t < part.last; ++t) {
    const int64_t k = t * kSteps, end = min(k + kSteps, x.words.steps);
    for (int i = 0; i < 2; ++i) fill<bits>(w, min(2 * part.pair + i, w.panels() - 1), k, end, i, tile);
    for (int64_t stack = 0; stack < x.words.stacks; ++stack) {
      const int64_t m = x.words.first(stack), rows = x.words.first(stack + 1) - m, at = t * kChunks * count + m;
      multiplier.multiply(rows, tile, end - k, x.words.at(t, m), x.units + at, x.sums + at, count, totals + 2 * m,
                          t == 0);
    }
  }
}

// Multiplier<digits> multiplies a stack as `multiply_digits` does.
template <template <int> class Multiplier>
void many_digits(const Weight& w, const DigitStacks& x, const Part& part, const Output& y) {
  const auto totals = static_cast<V::F*>(part.sums);
  with_bits(w.bits, [&](auto bits) {
    constexpr int width = decltype(bits)::value;
    if (x.words.digits == 2) multiply_digit_part<width, Multiplier<2>>(w, x, part, totals);
    else multiply_digit_part<width, Multiplier<3>>(w, x, part, totals);
  });
  if (part.last < x.words.tiles()) return;
  for (int64_t m = 0; m < x.words.count; ++m)
    for (int i = 0; i < 2; ++i) write<V>(y, w.rows, m, 2 * part.pair + i, totals[2 * m + i]);
}
