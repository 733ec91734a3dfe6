// y = x W^T for many rows of x: a tile of W^T (two panels, some inputs) lies in the first-level cache and is multiplied
// by all rows of x; bound by arithmetic.
//
// A product type P says how many neighbouring inputs one word of a lane holds (`pack`): one float32, two bfloat16 or
// four bytes. Sum is a register of 16 sums, and dot adds the products of a word to them.
#pragma once

constexpr int64_t kSteps = 128;  // words of a tile, 16 KiB for two panels

// The sums of M rows of x and two panels of 16 rows, 64 bytes a step each; added to y (M, 2) unless they are the first.
template <class P, int M>
void multiply(const uint8_t* low, const uint8_t* high, int64_t steps, const typename P::Word* x, int64_t stride,
              typename P::Sum* y, bool first) {
  typename P::Sum sums[M][2];
  UNROLL for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = P::zero();
  for (int64_t k = 0; k < steps; ++k) {
    const typename P::Sum left = P::load(low + 64 * k), right = P::load(high + 64 * k);
    UNROLL for (int m = 0; m < M; ++m) {
      const typename P::Sum value = P::broadcast(x[m * stride + k]);
      sums[m][0] = P::dot(sums[m][0], left, value);
      sums[m][1] = P::dot(sums[m][1], right, value);
    }
  }
  UNROLL for (int m = 0; m < M; ++m) {
    y[2 * m] = first ? sums[m][0] : P::add(y[2 * m], sums[m][0]);
    y[2 * m + 1] = first ? sums[m][1] : P::add(y[2 * m + 1], sums[m][1]);
  }
}

template <class P>
using Multiply = void (*)(const uint8_t*, const uint8_t*, int64_t, const typename P::Word*, int64_t, typename P::Sum*,
                          bool);

template <class P, int M = V::tall>
Multiply<P> multiply_rows(int64_t rows) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<P, M - 1>(rows);
  }
  return multiply<P, M>;
}

// Multiplies a tile, whose first step is step k, by all rows of x, in stacks of about equal height: sums (rows, 2) of
// 16 lanes.
template <class P>
ALWAYS_INLINE void multiply_all(const uint8_t* low, const uint8_t* high, int64_t k, int64_t steps,
                                const Rows<typename P::Word>& x, typename P::Sum* sums) {
  const int64_t stacks = (x.count + V::tall - 1) / V::tall;
  for (int64_t stack = 0; stack < stacks; ++stack) {
    const int64_t m = stack * x.count / stacks, end = (stack + 1) * x.count / stacks;
    multiply_rows<P>(end - m)(low, high, steps, x.values + m * x.stride + k, x.stride, sums + 2 * m, k == 0);
  }
}

// For each of the pairs of panels [first, last): tile(panel, k, end, memory) gives the words [k, end) of a panel, in
// `memory` or elsewhere; they are multiplied by all rows of x, and write(m, panel, sum) gets the results. A pair may
// have a panel beyond the last one, which repeats it.
template <class P, class Tile, class Write>
ALWAYS_INLINE void multiply_pairs(int64_t panels, int64_t steps, const Rows<typename P::Word>& x, int64_t first,
                                  int64_t last, Tile&& tile, Write&& write) {
  alignas(64) uint8_t memory[2][64 * kSteps];
  typename P::Sum sums[2 * kMany];
  for (int64_t pair = first; pair < last; ++pair) {
    for (int64_t k = 0; k < steps; k += kSteps) {
      const int64_t end = min(k + kSteps, steps);
      const uint8_t* tiles[2];
      for (int i = 0; i < 2; ++i) tiles[i] = tile(min(2 * pair + i, panels - 1), k, end, memory[i]);
      multiply_all<P>(tiles[0], tiles[1], k, end - k, x, sums);
    }
    for (int64_t m = 0; m < x.count; ++m)
      for (int i = 0; i < 2; ++i) write(m, 2 * pair + i, sums[2 * m + i]);
  }
}

template <class P>
void many(const Weight& w, const Rows<typename P::Word>& x, const Output& y, int64_t first, int64_t last) {
  with_bits(w.bits, [&](auto bits) {
    const auto tile = [&](int64_t panel, int64_t k, int64_t end, uint8_t* memory) {
      P::template decode<decltype(bits)::value>(w, panel, k * P::pack, end * P::pack, memory);
      return memory;
    };
    multiply_pairs<P>(w.panels(), w.halves() * kHalf / P::pack, x, first, last, tile,
                      [&](int64_t m, int64_t panel, typename P::Sum sum) { write<V>(y, w.rows, m, panel, sum); });
  });
}
