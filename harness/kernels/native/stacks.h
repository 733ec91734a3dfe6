// Many rows of x in the order in which the kernels read them.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "rows.h"

namespace ptqbench {

constexpr int64_t kTallest = 32;  // no stack has more rows

// Room for `count` rows of so many steps, in memory of this thread.
template <class Word>
Stacks<Word> room(int64_t count, int64_t steps, Order order, int64_t digits = 1) {
  static thread_local std::vector<Word> memory;
  Stacks<Word> stacks{nullptr, count, (count + order.tall - 1) / order.tall, steps, digits, order.by_rows};
  stacks.words = grow(memory, stacks.tiles() * count * kSteps * digits);
  return stacks;
}

template <class Word>
Lane<Word> lane(const Stacks<Word>& x, int64_t tile, int64_t row) {
  if (x.by_rows) return {x.at(tile, row), 1, kSteps};
  const int64_t stack = x.stack(row), first = x.first(stack);
  return {x.at(tile, first) + (row - first) * x.digits, (x.first(stack + 1) - first) * x.digits, 1};
}

template <class Word>
int64_t grain_of(const Stacks<Word>& x, int64_t rows) {
  return std::max<int64_t>(1, kTogether / (rows * x.steps * x.digits));
}

// Calls use(first row, rows, tile) for all tiles of all stacks, shared among the threads.
template <class Word, class Use>
void each_stack(const Stacks<Word>& x, Use&& use) {
  at::parallel_for(0, x.stacks, grain_of(x, x.count / x.stacks), [&](int64_t begin, int64_t end) {
    for (int64_t stack = begin; stack < end; ++stack)
      for (int64_t tile = 0; tile < x.tiles(); ++tile) use(x.first(stack), x.first(stack + 1) - x.first(stack), tile);
  });
}

// Calls use(m, tile) for all tiles of all rows, those of a row in order; rows are shared among the threads.
template <class Word, class Use>
void each_tile(const Stacks<Word>& x, Use&& use) {
  at::parallel_for(0, x.count, grain_of(x, 1), [&](int64_t first, int64_t last) {
    for (int64_t tile = 0; tile < x.tiles(); ++tile)
      for (int64_t m = first; m < last; ++m) use(m, tile);
  });
}

// Rows [row, row + count) of x (M, K) in words of one float32 or two bfloat16.
template <class Word>
Stacks<Word> stacks_of(const Level& level, const at::Tensor& x, int64_t row, int64_t count) {
  constexpr bool floats = std::is_same_v<Word, float>;
  const int64_t pack = floats ? 1 : 2, inputs = x.size(1);
  const Stacks<Word> stacks =
      room<Word>(count, (inputs + kHalf - 1) / kHalf * kHalf / pack, floats ? level.floats : level.words);
  each_stack(stacks, [&](int64_t first, int64_t height, int64_t tile) {
    Word memory[kTallest * kSteps], *words = stacks.by_rows ? stacks.at(tile, first) : memory;
    const int64_t step = tile * kSteps, steps = std::min(kSteps, stacks.steps - step);
    const int64_t used = std::min((step + steps) * pack, inputs) - step * pack;
    for (int64_t m = 0; m < height; ++m) {
      std::fill(words + m * kSteps + used / pack, words + m * kSteps + steps, Word{0});
      copy_row(x, row + first + m, step * pack, used, words + m * kSteps);
    }
    if (!stacks.by_rows)
      level.interleave(reinterpret_cast<const uint32_t*>(words), height, steps,
                       reinterpret_cast<uint32_t*>(stacks.at(tile, first)));
  });
  return stacks;
}

}  // namespace ptqbench
