// What the headers of a level need; included inside the level's namespace, after the processor's features are set.
#pragma once
#ifndef ALWAYS_INLINE
#define ALWAYS_INLINE inline __attribute__((always_inline))
#endif
#define UNROLL _Pragma("GCC unroll 16")

template <int value_>
struct Index {
  static constexpr int value = value_;
};
template <int... k>
struct Indices {};
using Sixteen = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

ALWAYS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls use(bits) with the width of a weight as a compile-time constant.
template <class Use>
ALWAYS_INLINE void with_bits(int bits, Use&& use) {
  switch (bits) {
    case 2: return use(Index<2>{});
    case 3: return use(Index<3>{});
    case 4: return use(Index<4>{});
    case 5: return use(Index<5>{});
    case 6: return use(Index<6>{});
    default: return use(Index<8>{});
  }
}
