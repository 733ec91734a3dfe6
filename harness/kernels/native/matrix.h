// Products in the matrix engine (AMX). Its registers hold up to 16 rows of 16 words: of x, of W^T (a step of a panel is
// a row), and of sums.
#pragma once

constexpr int64_t kMatrixRows = 32;  // of a stack: two registers of x, which are multiplied by two panels

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of a register
  uint8_t rows[16] = {};
};

// The instructions, for registers known to the compiler; the intrinsics do not say that they read and write memory.
template <int to>
ALWAYS_INLINE void load_matrix(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(to) : "memory");
}

template <int from>
ALWAYS_INLINE void store_matrix(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(from) : "memory");
}

template <int matrix>
ALWAYS_INLINE void clear_matrix() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(matrix));
}

// Multiplies stacks of x, whose words lie row by row, see Stacks. P::products<sums, x, panel>() multiplies registers.
// Sums of 16 rows of x and a panel are registers 0 to 3, rows of x are 4 and 5, panels 6 and 7.
template <class P>
class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() {
    if (rows_) _tile_release();
  }

  static constexpr int64_t together = 4;  // tiles whose products are added in the registers

  void multiply(int64_t rows, const Operands<P>* tiles, int64_t count, typename P::Sum* y, bool first) {
    const int64_t rest = tiles[count - 1].steps % kPanel;  // of the last tile of a row
    if (count > 1 || tiles[0].steps > rest) pass(rows, tiles, count, y, first);
    if (!rest) return;
    Operands<P> last = tiles[count - 1];
    const int64_t whole = last.steps - rest;
    const Operands<P> end{last.low + 64 * whole, last.high + 64 * whole, rest, last.x + whole};
    configure(rows, rest);
    add_all(rows, y, first && count == 1 && !whole, [&](auto both) { add<decltype(both)::value>(end, 0); });
  }

 private:
  void pass(int64_t rows, const Operands<P>* tiles, int64_t count, typename P::Sum* y, bool first) {
    configure(rows, kPanel);
    add_all(rows, y, first, [&](auto both) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k + kPanel <= tiles[i].steps; k += kPanel) add<decltype(both)::value>(tiles[i], k);
    });
  }

  // Calls products(whether there are more rows than those of a register), between loads and stores of the sums.
  template <class Products>
  static ALWAYS_INLINE void add_all(int64_t rows, typename P::Sum* y, bool first, Products&& products) {
    char *sums = reinterpret_cast<char*>(y), *more = sums + kPanel * kSumStride;
    start<0, 1>(sums, first);
    if (rows > kPanel) {
      start<2, 3>(more, first);
      products(std::true_type{});
      finish<2, 3>(more);
    } else {
      products(std::false_type{});
    }
    finish<0, 1>(sums);
  }

  template <bool both>
  static ALWAYS_INLINE void add(const Operands<P>& tile, int64_t k) {
    load_matrix<6>(tile.low + 64 * k, 64);
    load_matrix<4>(tile.x + k, kRowStride);
    P::template products<0, 4, 6>();
    if constexpr (both) {
      load_matrix<5>(tile.x + k + kPanel * kSteps, kRowStride);
      P::template products<2, 5, 6>();
    }
    load_matrix<7>(tile.high + 64 * k, 64);
    P::template products<1, 4, 7>();
    if constexpr (both) P::template products<3, 5, 7>();
  }

  void configure(int64_t rows, int64_t steps) {
    if (rows == rows_ && steps == steps_) return;
    rows_ = rows;
    steps_ = steps;
    Shapes shapes;
    for (int i = 0; i < 8; ++i) {
      const bool second = i == 2 || i == 3 || i == 5, panel = i >= 6;
      const int64_t lines = panel ? steps : min(kPanel, second ? rows - kPanel : rows);
      if (lines <= 0) continue;
      shapes.rows[i] = static_cast<uint8_t>(lines);
      shapes.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * steps : 64);
    }
    _tile_loadconfig(&shapes);
  }

  template <int left, int right>
  static void start(const char* sums, bool first) {
    if (first) {
      clear_matrix<left>();
      clear_matrix<right>();
    } else {
      load_matrix<left>(sums, kSumStride);
      load_matrix<right>(sums + 64, kSumStride);
    }
  }

  template <int left, int right>
  static void finish(char* sums) {
    store_matrix<left>(sums, kSumStride);
    store_matrix<right>(sums + 64, kSumStride);
  }

  static constexpr int64_t kSumStride = 128, kRowStride = 4 * kSteps;  // bytes
  int64_t rows_ = 0, steps_ = 0;
};

struct BfloatMatrix : BfloatProduct {
  using Multiplier = Engine<BfloatMatrix>;
  template <int sums, int x, int panel>
  static ALWAYS_INLINE void products() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(panel));
  }
};

struct ByteMatrix : ByteProduct<V> {
  using Multiplier = Engine<ByteMatrix>;
  template <int sums, int x, int panel>
  static ALWAYS_INLINE void products() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(panel));
  }
};
