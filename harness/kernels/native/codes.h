// Where the codes of a block lie, and the value of each. Included by every level after its vector class.
//
// `bits` words of 32 bits hold 32 codes of one row. Widths that divide 32 fill the words in order. At 3, 5 and 6 bits a
// word holds whole codes in its lower 30 bits; the upper two bits of all words together hold the last code of each
// half.
#pragma once

template <int bits>
inline constexpr bool divides = 32 % bits == 0;

// The code made of the upper bits of the words of a half, lowest bits first; the middle word of an odd number of words
// gives bit 30 to the first half and bit 31 to the second.
template <class V, int bits, int half>
ALWAYS_INLINE typename V::I last_code(const uint8_t* block) {
  const uint8_t* words = block + 64 * (half ? (bits + 1) / 2 : 0);
  typename V::I sum = V::template right<30>(V::load(words));
  if constexpr (bits >= 5) sum = V::either(sum, V::template left<2>(V::template right<30>(V::load(words + 64))));
  if constexpr (bits == 6) sum = V::either(sum, V::template left<4>(V::template right<30>(V::load(words + 128))));
  if constexpr (bits % 2 == 1) {
    typename V::I middle = V::load(block + 64 * (bits / 2));
    middle = V::template left<bits - 1>(V::template right<31>(half ? middle : V::template left<1>(middle)));
    sum = V::either(sum, middle);
  }
  return sum;
}

// Code `k` (0..15) of half `half`, in the low bits; the bits above it are not cleared.
template <class V, int bits, int half, int k>
ALWAYS_INLINE typename V::I code(const uint8_t* block) {
  if constexpr (divides<bits>) {
    constexpr int count = 32 / bits, slot = half * 16 + k;
    return V::template right<bits*(slot % count)>(V::load(block + 64 * (slot / count)));
  } else if constexpr (k < 15) {
    constexpr int count = 30 / bits, slot = half * 15 + k;
    return V::template right<bits*(slot % count)>(V::load(block + 64 * (slot / count)));
  } else {
    return last_code<V, bits, half>(block);
  }
}

// The levels of the codes in registers: up to 16, or 32.
template <class V, int bits>
struct Levels {
  typename V::F low, high;
  ALWAYS_INLINE explicit Levels(const float* levels) {
    if constexpr (bits <= 5) low = V::load(levels);
    if constexpr (bits == 5) high = V::load(levels + 16);
  }
  // The value of a code whose upper bits are not cleared: a level, or for 6 and 8 bits the signed integer.
  ALWAYS_INLINE typename V::F operator()(typename V::I code) const {
    if constexpr (bits <= 4) return V::lookup(low, code);
    else if constexpr (bits == 5) return V::lookup(low, high, code);
    else return V::to_float(V::template arithmetic<32 - bits>(V::template left<32 - bits>(code)));
  }
};

// Calls use(k, value) for the 16 inputs of a half block, k a compile-time constant.
template <class V, int bits, int half, class Use, int... k>
ALWAYS_INLINE void each(const uint8_t* block, const Levels<V, bits>& levels, Use&& use, Indices<k...>) {
  (use(Index<k>{}, levels(code<V, bits, half, k>(block))), ...);
}

template <class V, int bits, class Use>
ALWAYS_INLINE void each_value(const uint8_t* block, bool second, const Levels<V, bits>& levels, Use&& use) {
  if (second) each<V, bits, 1>(block, levels, use, Sixteen{});
  else each<V, bits, 0>(block, levels, use, Sixteen{});
}

template <class V>
ALWAYS_INLINE typename V::F load_scale(const void* values, Scale type, int64_t index) {
  switch (type) {
    case Scale::float16: return V::load_half(static_cast<const uint16_t*>(values) + index);
    case Scale::bfloat16: return V::load_bfloat(static_cast<const uint16_t*>(values) + index);
    default: return V::load(static_cast<const float*>(values) + index);
  }
}
