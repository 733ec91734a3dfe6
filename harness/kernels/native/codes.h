// Where the codes of a block lie, and the value of each. Included by every level after its vector class.
//
// `bits` words of 32 bits hold 32 codes of one row. Four neighbouring inputs lie at the same place of the four bytes of
// a word. A width is split into planes of 8, 4, 2 or 1 bits, each in words of its own; but a byte holds two codes of 3
// bits, and what is left of three bytes holds two more.
#pragma once

// What the codes of a weight are, as a type: floats with so many bits of exponent; 0: levels, or signed integers.
template <int bits_, int exponent_ = 0>
struct KindOf {
  static constexpr int bits = bits_, exponent = exponent_;
};

// Calls use(kind) with the kind of the codes of a weight.
template <class Use>
ALWAYS_INLINE void with_kind(const Weight& w, Use&& use) {
  if (w.bits == 8 && w.exponent == 4) return use(KindOf<8, 4>{});
  if (w.bits == 8 && w.exponent == 5) return use(KindOf<8, 5>{});
  if (w.bits == 6 && w.exponent == 2) return use(KindOf<6, 2>{});
  if (w.bits == 6 && w.exponent == 3) return use(KindOf<6, 3>{});
  with_bits(w.bits, [&](auto bits) { use(KindOf<decltype(bits)::value>{}); });
}

// The planes of a width: `low` bits, and above them `high` bits or none.
template <int bits>
struct Planes {
  static constexpr int low = bits == 5 || bits == 6 ? 4 : bits, high = bits - low;
};

// The words of plane `first` of `width` bits that hold inputs 4 * four and the next three, shifted so that bit `shift`
// of the plane's lowest byte comes to bit `to`.
template <class V, int first, int width, int four, int shift, int to>
ALWAYS_INLINE typename V::I plane(const uint8_t* block) {
  constexpr int count = 8 / width, from = shift + width * (four % count);
  const typename V::I words = V::load(block + 64 * (first + four / count));
  if constexpr (from >= to) return V::template right<from - to>(words);
  else return V::template left<to - from>(words);
}

constexpr int64_t kAhead = 2048;  // bytes: what a processor reads ahead by itself is too near at few bits a code

// Asks for the block that is read some blocks later. Memory that is not there is not touched.
template <int bits>
ALWAYS_INLINE void prefetch(const uint8_t* block) {
  if constexpr (bits < 8) UNROLL for (int word = 0; word < bits; ++word) __builtin_prefetch(block + 64 * word + kAhead);
}

// Codes of 3 bits: two to a byte of each of three words. Those of the last eight inputs have their lower bits above
// these in the first and the second word, and their upper bits in the third.
template <class V, int four, int byte>
ALWAYS_INLINE typename V::I four_codes_of_3(const uint8_t* block) {
  if constexpr (four < 6) {
    return V::template right<8 * byte + 3 * (four % 2)>(V::load(block + 64 * (four / 2)));
  } else {
    const typename V::I low = V::template right<8 * byte + 6>(V::load(block + 64 * (four - 6)));
    const typename V::I high = V::template right<8 * byte + four - 2>(V::load(block + 128));
    return V::template merge<0x03030303>(low, high);
  }
}

// Asks for the same block of the next pair of panels: while a tile is multiplied, no codes are read.
template <int bits>
ALWAYS_INLINE void prefetch_pair(const Panels& w, const uint8_t* block) {
  const uint8_t* next = block + 2 * w.blocks() * bits * 64;
  UNROLL for (int word = 0; word < bits; ++word) __builtin_prefetch(next + 64 * word, 0, 2);  // into the second level
}

// The codes of inputs 4 * four and the next three, in the low bits of the bytes of each word, from byte `byte` on; the
// bits above a code are not cleared.
template <class V, int bits, int four, int byte>
ALWAYS_INLINE typename V::I four_codes(const uint8_t* block) {
  if constexpr (bits == 3) return four_codes_of_3<V, four, byte>(block);
  using P = Planes<bits>;
  const typename V::I low = plane<V, 0, P::low, four, 8 * byte, 0>(block);
  if constexpr (P::high) {
    const typename V::I high = plane<V, P::low, P::high, four, 8 * byte, P::low>(block);
    return V::template merge<0x01010101 * ((1 << P::low) - 1)>(low, high);
  }
  return low;
}

// Code `k` (0..15) of half `half`, in the low bits; the bits above it are not cleared.
template <class V, int bits, int half, int k>
ALWAYS_INLINE typename V::I code(const uint8_t* block) {
  return four_codes<V, bits, half * 4 + k / 4, k % 4>(block);
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

// Floats in the low (byte 0) or high bytes of 16-bit lanes as halves (IEEE 754), by shifts: with the exponent and the
// mantissa of a half's widths, a number is 2^(bias - 15) of its value, a subnormal one too.
template <class V, class Kind, int byte>
ALWAYS_INLINE typename V::I halves_of(typename V::I words) {
  constexpr int places = 10 - (Kind::bits - 1 - Kind::exponent);
  constexpr uint32_t used = 0x8000u | ((1u << (Kind::bits - 1)) - 1) << places;
  const typename V::I top = V::template left_of_16<16 - 8 * byte - Kind::bits>(words);
  const typename V::I wide = V::template arithmetic_of_16<5 - Kind::exponent>(top);
  return V::both(wide, V::integer(static_cast<int32_t>(used | used << 16)));
}

// Calls use(k, value) for inputs 4 * four and the next three of a half block of floats, whose words lie in another
// order: the bytes of the first two inputs of all rows, and then those of the last two.
template <class V, class Kind, int half, class Use, int four>
ALWAYS_INLINE void each_float_of(const uint8_t* block, Use&& use, Index<four>) {
  const typename V::I words = four_codes<V, Kind::bits, half * 4 + four, 0>(block);
  const typename V::I even = halves_of<V, Kind, 0>(words), odd = halves_of<V, Kind, 1>(words);
  use(Index<4 * four>{}, V::template widened<0>(even));
  use(Index<4 * four + 1>{}, V::template widened<0>(odd));
  use(Index<4 * four + 2>{}, V::template widened<1>(even));
  use(Index<4 * four + 3>{}, V::template widened<1>(odd));
}

template <class V, class Kind, int half, class Use, int... four>
ALWAYS_INLINE void each_float(const uint8_t* block, Use&& use, Indices<four...>) {
  (each_float_of<V, Kind, half>(block, use, Index<four>{}), ...);
}

// Calls use(k, value) for the 16 inputs of a half block, whatever its codes are.
template <class V, class Kind, class Use>
ALWAYS_INLINE void each_value(const uint8_t* block, bool second, const Levels<V, Kind::bits>& levels, Use&& use) {
  using Fours = Indices<0, 1, 2, 3>;
  if constexpr (Kind::exponent) {
    if (second) each_float<V, Kind, 1>(block, use, Fours{});
    else each_float<V, Kind, 0>(block, use, Fours{});
  } else {
    if (second) each<V, Kind::bits, 1>(block, levels, use, Sixteen{});
    else each<V, Kind::bits, 0>(block, levels, use, Sixteen{});
  }
}

template <class V>
ALWAYS_INLINE typename V::F load_scale(const void* values, Scale type, int64_t index) {
  switch (type) {
    case Scale::float16: return V::load_half(static_cast<const uint16_t*>(values) + index);
    case Scale::bfloat16: return V::load_bfloat(static_cast<const uint16_t*>(values) + index);
    default: return V::load(static_cast<const float*>(values) + index);
  }
}
