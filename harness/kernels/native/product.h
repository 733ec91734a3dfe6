// y = x W^T for many rows of x: a tile of W^T (two panels, kSteps words) lies in the first-level cache and is
// multiplied by all rows of x, stack by stack; bound by arithmetic.
//
// A product type P says how many neighbouring inputs one word of a lane holds (`pack`): one float32, two bfloat16 or
// four bytes. Sum is a register of 16 sums, dot adds the products of a word to them, and Multiplier multiplies a stack.
#pragma once

// The sums of a stack of M rows of x, whose words lie step by step, and two panels of 16 rows, 64 bytes a step each;
// added to y (M, 2) unless they are the first.
template <class P, int M>
void multiply(const uint8_t* low, const uint8_t* high, int64_t steps, const typename P::Word* x, typename P::Sum* y,
              bool first) {
  typename P::Sum sums[M][2];
  UNROLL for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = P::zero();
  for (int64_t k = 0; k < steps; ++k, x += M) {
    const typename P::Sum left = P::load(low + 64 * k), right = P::load(high + 64 * k);
    UNROLL for (int m = 0; m < M; ++m) {
      const typename P::Sum value = P::broadcast(x[m]);
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
using Multiply = void (*)(const uint8_t*, const uint8_t*, int64_t, const typename P::Word*, typename P::Sum*, bool);

template <class P, int M = V::tall>
Multiply<P> multiply_rows(int64_t rows) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<P, M - 1>(rows);
  }
  return multiply<P, M>;
}

// One tile of a pair of panels, and the words of a stack of x for it.
template <class P>
struct Operands {
  const uint8_t *low, *high;
  int64_t steps;
  const typename P::Word* x;
};

// A stack with one tile after another, whose sums lie in memory between them.
template <class P>
struct Registers {
  static constexpr int64_t together = 1;  // tiles that are decoded before the stacks are multiplied
  void multiply(int64_t rows, const Operands<P>* tiles, int64_t count, typename P::Sum* y, bool first) const {
    for (int64_t i = 0; i < count; ++i)
      multiply_rows<P>(rows)(tiles[i].low, tiles[i].high, tiles[i].steps, tiles[i].x, y, first && !i);
  }
};

// A part: tile(panel, k, end, memory) gives the words [k, end) of a panel, in `memory` or elsewhere, and
// write(m, panel, sum) gets the results after the last tile. A missing panel repeats the one before.
template <class P, class Tile, class Write>
ALWAYS_INLINE void multiply_part(int64_t panels, const Stacks<typename P::Word>& x, const Part& part, Tile&& tile,
                                 Write&& write) {
  constexpr int64_t together = P::Multiplier::together;
  alignas(64) uint8_t memory[together][2][64 * kSteps];
  Operands<P> tiles[together];
  const auto sums = static_cast<typename P::Sum*>(part.sums);
  typename P::Multiplier multiplier;
  for (int64_t t = part.first; t < part.last; t += together) {
    const int64_t count = min(together, part.last - t);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = (t + i) * kSteps, end = min(k + kSteps, x.steps);
      tiles[i].low = tile(2 * part.pair, k, end, memory[i][0]);
      tiles[i].high = tile(min(2 * part.pair + 1, panels - 1), k, end, memory[i][1]);
      tiles[i].steps = end - k;
    }
    for (int64_t stack = 0; stack < x.stacks; ++stack) {
      const int64_t m = x.first(stack), rows = x.first(stack + 1) - m;
      for (int64_t i = 0; i < count; ++i) tiles[i].x = x.at(t + i, m);
      multiplier.multiply(rows, tiles, count, sums + 2 * m, t == 0);
    }
  }
  if (part.last < x.tiles()) return;
  for (int64_t m = 0; m < x.count; ++m)
    for (int i = 0; i < 2; ++i) write(m, 2 * part.pair + i, sums[2 * m + i]);
}

template <class P>
void many(const Weight& w, const Stacks<typename P::Word>& x, const Part& part, const Output& y) {
  with_kind(w, [&](auto kind) {
    const auto tile = [&](int64_t panel, int64_t k, int64_t end, uint8_t* memory) {
      P::template decode<decltype(kind)>(w, panel, k * P::pack, end * P::pack, memory);
      return memory;
    };
    multiply_part<P>(w.panels(), x, part, tile,
                     [&](int64_t m, int64_t panel, typename P::Sum sum) { write<V>(y, w.rows, m, panel, sum); });
  });
}
