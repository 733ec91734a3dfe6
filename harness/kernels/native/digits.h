// y = x W^T for few rows of x and integer codes, by products of bytes: a value of x is a sum of digits
//
//   x[m, k] = unit[m, c] sum_d 256^d digit_d[m, k],   digits from -128 to 127
//
// where c is a chunk of at most kChunk inputs of one group and `unit` a power of two, so that the largest value of a
// chunk fills its digits: three digits are a float32 to 23 bits, and two a bfloat16 to 15. One instruction multiplies
// 64 codes by one digit, where a product in float32 takes four, and shifts and look-ups for each. Sums of products are
// exact integers up to the end of a chunk.
#pragma once

// The codes of inputs 4 * four and the next three without a sign, a byte each.
template <class V, int bits, int four>
ALWAYS_INLINE typename V::I code_bytes(const uint8_t* block) {
  const typename V::I codes = four_codes<V, bits, four, 0>(block);
  const typename V::I used = bits == 8 ? codes : V::both(codes, V::integer(0x01010101 * ((1 << bits % 8) - 1)));
  if constexpr (bits <= 5) return used;
  else return V::different(used, V::integer(static_cast<int32_t>(0x01010101u << (bits - 1))));  // they had a sign
}

// The value in units of the sums of the digits of a row, lowest first.
template <class V>
ALWAYS_INLINE typename V::F joined(typename V::I low, typename V::I high) {
  return V::fma(V::to_float(high), V::broadcast(256), V::to_float(low));
}
template <class V>
ALWAYS_INLINE typename V::F joined(typename V::I low, typename V::I middle, typename V::I high) {
  return joined<V>(low, V::add(V::template left<8>(high), middle));
}

// What is added to a code without a sign, for group `at` (panel, group, 16) of a weight.
template <class V>
ALWAYS_INLINE typename V::F load_offset(const Weight& w, int64_t at) {
  const typename V::F lowest = V::broadcast(w.lowest);
  return w.zero ? V::sub(lowest, load_scale<V>(w.zero, w.scale_type, at)) : lowest;
}

template <class V, int bits, int M, int D>
struct FewDigits {
  static constexpr int chains = M == 1 ? 2 : 1;  // independent sums, because a product has a latency
  using F = typename V::F;
  using I = typename V::I;
  using Sums = I[M][D][chains];

  template <int... four>
  static ALWAYS_INLINE void add(const uint8_t* block, const uint32_t* words, Sums& sums, Indices<four...>) {
    const auto four_inputs = [&](auto i) {
      const I codes = code_bytes<V, bits, i.value>(block);
      UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int d = 0; d < D; ++d) {
          I& sum = sums[m][d][i.value % chains];
          sum = V::dot4(sum, codes, V::integer(static_cast<int32_t>(words[(i.value * M + m) * D + d])));
        }
      }
    };
    (four_inputs(Index<four>{}), ...);
  }

  // The sums over the halves [half, end).
  static ALWAYS_INLINE void chunk(const uint8_t* codes, int64_t half, int64_t end, const uint32_t* words, Sums& sums) {
    UNROLL for (int m = 0; m < M; ++m) {
      UNROLL for (int d = 0; d < D; ++d) { UNROLL for (int c = 0; c < chains; ++c) sums[m][d][c] = V::integer(0); }
    }
    while (half < end) {
      const uint8_t* block = codes + half / 2 * bits * 64;
      const uint32_t* inputs = words + half / 2 * 8 * M * D;
      prefetch<bits>(block);
      if (half % 2 == 0 && half + 1 < end) add(block, inputs, sums, Indices<0, 1, 2, 3, 4, 5, 6, 7>{}), half += 2;
      else if (half % 2 == 0) add(block, inputs, sums, Indices<0, 1, 2, 3>{}), ++half;
      else add(block, inputs, sums, Indices<4, 5, 6, 7>{}), ++half;
    }
  }

  // The value in units of the digits of a row of x, whose chains are added.
  static ALWAYS_INLINE F joined_chains(const I (&sums)[D][chains]) {
    I whole[D];
    UNROLL for (int d = 0; d < D; ++d) {
      whole[d] = sums[d][0];
      if constexpr (chains == 2) whole[d] = V::add(whole[d], sums[d][1]);
    }
    if constexpr (D == 2) return joined<V>(whole[0], whole[1]);
    else return joined<V>(whole[0], whole[1], whole[2]);
  }

  static void panel(const Weight& w, const DigitRows& x, int64_t p, F (&total)[M]) {
    const uint8_t* codes = w.panel(p);
    const float *units = x.units, *input_sums = x.sums;
    UNROLL for (int m = 0; m < M; ++m) total[m] = V::zero();
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t at = (p * w.groups + g) * kPanel, last = min((g + 1) * (w.group / kHalf), w.halves());
      const F scale = load_scale<V>(w.scale, w.scale_type, at), offset = load_offset<V>(w, at);
      for (int64_t half = g * (w.group / kHalf); half < last; half += kChunk / kHalf) {
        Sums sums;
        chunk(codes, half, min(half + kChunk / kHalf, last), x.words, sums);
        UNROLL for (int m = 0; m < M; ++m) {
          const F value = V::fma(offset, V::broadcast(input_sums[m]), joined_chains(sums[m]));
          total[m] = V::fma(value, V::mul(scale, V::broadcast(units[m])), total[m]);
        }
        units += M;
        input_sums += M;
      }
    }
  }

  static void run(const Weight& w, const DigitRows& x, const Output& y, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      F total[M];
      panel(w, x, p, total);
      for (int m = 0; m < x.count; ++m) write<V>(y, w.rows, m, p, total[m]);
    }
  }
};

template <class V, int bits, int D>
void few_digits_of(const Weight& w, const DigitRows& x, const Output& y, int64_t first, int64_t last) {
  switch (x.height) {
    case 1: return FewDigits<V, bits, 1, D>::run(w, x, y, first, last);
    case 2: return FewDigits<V, bits, 2, D>::run(w, x, y, first, last);
    case 4: return FewDigits<V, bits, 4, D>::run(w, x, y, first, last);
    default: return FewDigits<V, bits, 8, D>::run(w, x, y, first, last);
  }
}

template <class V>
void few_digits(const Weight& w, const DigitRows& x, const Output& y, int64_t first, int64_t last) {
  with_bits(w.bits, [&](auto bits) {
    if (x.digits == 2) few_digits_of<V, decltype(bits)::value, 2>(w, x, y, first, last);
    else few_digits_of<V, decltype(bits)::value, 3>(w, x, y, first, last);
  });
}

// The exponent of the unit in which values up to `largest` have so many digits.
inline int unit_exponent(float largest, int digits) {
  constexpr float margin = 128.0f / 127;  // the highest digit ends at 127, not at 128
  constexpr int smallest = -100;          // so that the inverse is finite
  return std::max(std::ilogb(largest * margin), smallest) + 2 - 8 * digits;
}

// The digits of 16 * halves values, at most kChunk, those of four neighbours in a word. Returns: their unit, and in
// `sum` their sum in units; a negative number if a value is not finite.
template <class V>
float split_chunk(const float* values, int64_t halves, int digits, const Lane<uint32_t>& to, float* sum) {
  typename V::F largest = V::zero(), finite = V::zero();
  for (int64_t i = 0; i < halves; ++i) {
    const typename V::F value = V::load(values + i * kHalf);
    largest = V::larger(largest, V::magnitude(value));
    finite = V::fma(value, V::zero(), finite);  // not a number where a value is infinite or none
  }
  if (V::total(finite) != 0) return -1;
  const int exponent = unit_exponent(V::largest(largest), digits);
  const typename V::F inverse = V::broadcast(std::ldexp(1.0f, -exponent));
  typename V::I total = V::integer(0);
  for (int64_t i = 0; i < halves; ++i) {
    typename V::I rest = V::to_integer(V::mul(V::load(values + i * kHalf), inverse));
    total = V::add(total, rest);
    for (int d = 0; d < digits; ++d) {
      const typename V::I digit = V::template arithmetic<24>(V::template left<24>(rest));
      uint32_t four[4];
      V::store_bytes(reinterpret_cast<int8_t*>(four), digit);
      for (int j = 0; j < 4; ++j) to.words[(i * 4 + j) * to.stride + d * to.digit] = four[j];
      rest = V::template arithmetic<8>(V::sub(rest, digit));
    }
  }
  *sum = static_cast<float>(V::total(total));
  return std::ldexp(1.0f, exponent);
}
