// Products of many rows of x, for the operators: which product, and what is multiplied at once.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>

#include "stacks.h"

namespace ptqbench {

constexpr int64_t kBlockBytes = 384 << 10;  // most bytes of x that are multiplied at once: they stay in the cache
constexpr int64_t kRowBytes = 1 << 20;      // likewise by rows, for a matrix engine: such processors have larger caches
constexpr int64_t kSumBytes = 4 << 20;      // most bytes of sums, likewise

// Memory of this thread that begins with a line of the cache.
inline char* lines(int64_t bytes) {
  char* memory = scratch<char>(bytes + 63);
  return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
}

// Calls multiply(part) for all pairs of panels and all tiles: some tiles of x are multiplied by some pairs before the
// next tiles, and these pairs by all tiles before the next pairs.
template <class Word, class Multiply>
void each_part(int64_t panels, const Stacks<Word>& x, Multiply&& multiply) {
  const int64_t tiles = x.tiles(), tile_bytes = x.count * x.digits * kSteps * sizeof(Word),
                sum_bytes = x.count * 2 * kPanel * 4;
  const int64_t most = std::max<int64_t>(1, (x.by_rows ? kRowBytes : kBlockBytes) / tile_bytes),
                blocks = (tiles + most - 1) / most;
  const int64_t pairs = blocks == 1 ? 1 : std::max<int64_t>(1, kSumBytes / sum_bytes);
  at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    char* sums = lines(std::min(pairs, end - begin) * sum_bytes);
    for (int64_t first = begin; first < end; first += pairs)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t pair = first; pair < std::min(first + pairs, end); ++pair)
          multiply(Part{pair, block * tiles / blocks, (block + 1) * tiles / blocks, sums + (pair - first) * sum_bytes});
  });
}

// Calls use(row, count) for the rows of x, kMany at most at once, in parts of about equal size.
template <class Use>
void each_many(int64_t rows, Use&& use) {
  const int64_t parts = (rows + kMany - 1) / kMany;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts;
    use(row, (part + 1) * rows / parts - row);
  }
}

template <class Word, class Many, class AnyWeight>
void in_words(const Level& level, Many many, const AnyWeight& w, const at::Tensor& x, const Output& y) {
  each_many(x.size(0), [&](int64_t row, int64_t count) {
    const Stacks<Word> stacks = stacks_of<Word>(level, x, row, count);
    each_part(w.panels(), stacks, [&](const Part& part) { many(w, stacks, part, y.from(row)); });
  });
}

// Tiles of a weight are decoded into the cache and multiplied by the product for the dtype of x. `kernels` are those of
// the level for the weight's format.
template <class Kernels, class AnyWeight>
void by_tiles(const Level& level, const Kernels& kernels, const AnyWeight& w, const at::Tensor& x, const Output& y) {
  if (x.scalar_type() == at::kBFloat16 && kernels.many_bf16) in_words<uint32_t>(level, kernels.many_bf16, w, x, y);
  else in_words<float>(level, kernels.many, w, x, y);
}

}  // namespace ptqbench
