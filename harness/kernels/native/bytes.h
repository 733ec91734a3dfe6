// y = x W^T for codes of 8 bits on both sides: sums of products are exact integers.
//
//   y[m, n] = ((sum_k code[n, k] x[m, k] - zero[n] sum_k x[m, k]) scale_x[m] + outliers) scale[n]
#pragma once

// See product.h: four inputs a word.
template <class V>
struct ByteProduct {
  using Word = uint32_t;
  using Sum = typename V::I;
  using Multiplier = Registers<ByteProduct>;
  static constexpr int64_t pack = 4;
  static ALWAYS_INLINE Sum zero() { return V::integer(0); }
  static ALWAYS_INLINE Sum broadcast(uint32_t x) { return V::integer(static_cast<int32_t>(x)); }
  static ALWAYS_INLINE Sum load(const uint8_t* p) { return V::load(p); }
  static ALWAYS_INLINE Sum add(Sum a, Sum b) { return V::add(a, b); }
  static ALWAYS_INLINE Sum dot(Sum sum, Sum weight, Sum x) { return V::dot4(sum, weight, x); }
};

// Splits the words of a panel into bytes; a weight of 8 bits is read where it is.
template <class V, int bits>
const uint8_t* split_bytes(const uint8_t* words, int64_t steps, uint8_t* tile) {
  constexpr int parts = 8 / bits;
  if constexpr (parts == 1) return words;
  const typename V::I mask = V::integer(static_cast<int32_t>(0x01010101u * ((1u << bits) - 1)));
  for (int64_t step = 0; step < steps; step += parts) {
    typename V::I word = V::load(words + step / parts * 64);
    for (int part = 0; part < parts; ++part) {
      V::store(tile + (step + part) * 64, V::both(word, mask));
      word = V::template right<bits % 8>(word);
    }
  }
  return tile;
}

template <class V>
typename V::F outlier_products(const ByteWeight& w, const Outliers& outliers, int64_t p) {
  typename V::F sum = V::zero();
  const uint8_t* panel = w.panel(p);
  for (int64_t i = 0; i < outliers.count; ++i) {
    const int64_t k = outliers.columns[i], four = k / 4, parts = 8 / w.bits;
    const int shift = static_cast<int>(8 * (k % 4) + four % parts * w.bits);
    const typename V::I word = V::shifted(V::load(panel + four / parts * 64), shift);
    const typename V::I code = V::both(word, V::integer((1 << w.bits) - 1));
    const typename V::I zero = V::load(reinterpret_cast<const uint8_t*>(w.zero + p * kPanel));
    sum = V::fma(V::broadcast(outliers.values[k]), V::to_float(V::sub(code, zero)), sum);
  }
  return sum;
}

template <class V>
ALWAYS_INLINE void write_bytes(const ByteWeight& w, const ByteRows& x, const Output& y, int64_t m, int64_t p,
                               typename V::I sum) {
  if (p >= w.panels()) return;
  const typename V::I zero = V::load(reinterpret_cast<const uint8_t*>(w.zero + p * kPanel));
  const typename V::F centred = V::to_float(V::sub(sum, V::times(zero, V::integer(x.sums[m]))));
  const typename V::F scale = V::load(w.scale + p * kPanel);
  typename V::F value = V::mul(V::mul(centred, scale), V::broadcast(x.scale[m]));
  if (x.outliers && x.outliers[m].count) value = V::fma(outlier_products<V>(w, x.outliers[m], p), scale, value);
  write<V>(y, w.rows, m, p, value);
}

template <class V, class P, int bits>
void bytes_of(const ByteWeight& w, const ByteRows& x, const Part& part, const Output& y) {
  const auto tile = [&](int64_t panel, int64_t k, int64_t end, uint8_t* memory) {
    return split_bytes<V, bits>(w.panel(panel) + k * 8 * bits, end - k, memory);
  };
  multiply_part<P>(w.panels(), x.words, part, tile,
                   [&](int64_t m, int64_t panel, typename P::Sum sum) { write_bytes<V>(w, x, y, m, panel, sum); });
}

template <class V, class P>
void bytes(const ByteWeight& w, const ByteRows& x, const Part& part, const Output& y) {
  switch (w.bits) {
    case 2: return bytes_of<V, P, 2>(w, x, part, y);
    case 4: return bytes_of<V, P, 4>(w, x, part, y);
    default: return bytes_of<V, P, 8>(w, x, part, y);
  }
}

template <class V>
float absmax(const float* values, int64_t count) {
  typename V::F largest = V::zero();
  for (int64_t i = 0; i < count; i += 16) largest = V::larger(largest, V::magnitude(V::load(values + i)));
  float lanes[16], result = 0;
  V::store(lanes, largest);
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

template <class V>
int32_t encode(const float* values, int64_t count, float scale, float low, float high, uint32_t* words,
               int64_t stride) {
  const typename V::F step = V::broadcast(scale), lowest = V::broadcast(low), highest = V::broadcast(high);
  typename V::F total = V::zero();
  for (int64_t i = 0; i < count; i += 16) {
    const typename V::F rounded = V::round(V::div(V::load(values + i), step));
    const typename V::F codes = V::smaller(V::larger(rounded, lowest), highest);
    total = V::add(total, codes);
    uint32_t four[4];
    V::store_bytes(reinterpret_cast<int8_t*>(four), codes);
    for (int64_t j = 0; j < 4; ++j) words[(i / 4 + j) * stride] = four[j];
  }
  float lanes[16];
  V::store(lanes, total);
  int32_t sum = 0;
  for (float lane : lanes) sum += static_cast<int32_t>(lane);
  return sum;
}
