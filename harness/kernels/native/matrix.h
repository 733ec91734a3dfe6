// Products in the matrix engine (AMX). Its registers hold up to 16 rows of 16 words: of x, of W^T (a step of a panel is
// a row), and of sums.
#pragma once

constexpr int64_t kMatrixRows = 32;  // of a stack: two registers of x, which are multiplied by two panels

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

// What a register holds: sums, words of x, or steps of a panel; and the row of the stack that is its first.
enum class Holds { sums, inputs, panel };
struct Held {
  Holds what;
  int64_t first;
};

// The shapes of the registers of this thread, which it gives back: others use them too.
class Shapes {
 public:
  Shapes() = default;
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
  ~Shapes() {
    if (rows_) _tile_release();
  }

  // For the products of `rows` rows and so many steps. Clears the registers where the shapes change.
  void set(const Held (&held)[8], int64_t rows, int64_t steps) {
    if (rows == rows_ && steps == steps_) return;
    rows_ = rows;
    steps_ = steps;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};  // of a row of a register
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      const int64_t lines = held[i].what == Holds::panel ? steps : min(kPanel, rows - held[i].first);
      if (lines <= 0) continue;
      shapes.rows[i] = static_cast<uint8_t>(lines);
      shapes.bytes[i] = static_cast<uint16_t>(held[i].what == Holds::inputs ? 4 * steps : 64);
    }
    _tile_loadconfig(&shapes);
  }

 private:
  int64_t rows_ = 0, steps_ = 0;
};

// Multiplies stacks of x, whose words lie row by row, see Stacks. P::products<sums, x, panel>() multiplies registers.
template <class P>
class Engine {
 public:
  static constexpr int64_t together = 4;  // tiles whose products are added in the registers

  void multiply(int64_t rows, const Operands<P>* tiles, int64_t count, typename P::Sum* y, bool first) {
    const int64_t rest = tiles[count - 1].steps % kPanel;  // of the last tile of a row
    if (count > 1 || tiles[0].steps > rest) pass(rows, tiles, count, y, first);
    if (!rest) return;
    const Operands<P>& last = tiles[count - 1];
    const int64_t whole = last.steps - rest;
    const Operands<P> end{last.low + 64 * whole, last.high + 64 * whole, rest, last.x + whole};
    shapes_.set(kHeld, rows, rest);
    add_all(rows, y, first && count == 1 && !whole, [&](auto both) { add<decltype(both)::value>(end, 0); });
  }

 private:
  void pass(int64_t rows, const Operands<P>* tiles, int64_t count, typename P::Sum* y, bool first) {
    shapes_.set(kHeld, rows, kPanel);
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
  static constexpr Held kHeld[8] = {{Holds::sums, 0},      {Holds::sums, 0},   {Holds::sums, kPanel},
                                    {Holds::sums, kPanel}, {Holds::inputs, 0}, {Holds::inputs, kPanel},
                                    {Holds::panel, 0},     {Holds::panel, 0}};
  Shapes shapes_;
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

// Multiplies stacks of at most 16 rows in D digits, see many_digits.h: the digits of a row lie one after another.
template <int D>
class DigitEngine {
 public:
  void multiply(int64_t rows, const DigitTile& tile, int64_t steps, const uint32_t* x, const float* units,
                const float* sums, int64_t stride, V::F* y, bool first) {
    for (int64_t m = 0; first && m < 2 * rows; ++m) y[m] = V::zero();
    for (int64_t c = 0; c * kChunkWords < steps; ++c, units += stride, sums += stride) {
      const int64_t k = c * kChunkWords;
      V::I products[kPanel][D][2];
      shapes_.set(kHeld, rows, min(kChunkWords, steps - k));
      multiply_chunk<0>(tile.codes[0] + 64 * k, x + k, &products[0][0][0]);
      multiply_chunk<3>(tile.codes[1] + 64 * k, x + k, &products[0][0][1]);
      for (int64_t m = 0; m < rows; ++m) {
        for (int i = 0; i < 2; ++i)
          y[2 * m + i] = scaled(tile, c, i, units[m], sums[m], joined_digits<D>(products[m], i), y[2 * m + i]);
      }
    }
  }

 private:
  // The sums of a panel are registers `sums` and those after it.
  template <int sums>
  static ALWAYS_INLINE void multiply_chunk(const uint8_t* codes, const uint32_t* x, V::I* products) {
    load_matrix<7>(codes, 64);
    add_digit<sums>(x);
    add_digit<sums + 1>(x + kSteps);
    if constexpr (D == 3) add_digit<sums + 2>(x + 2 * kSteps);
    store_matrix<sums>(products, 128 * D);
    store_matrix<sums + 1>(products + 2, 128 * D);
    if constexpr (D == 3) store_matrix<sums + 2>(products + 4, 128 * D);
  }

  template <int sums>
  static ALWAYS_INLINE void add_digit(const uint32_t* x) {
    clear_matrix<sums>();
    load_matrix<6>(x, 4 * D * kSteps);
    ByteMatrix::products<sums, 6, 7>();
  }

  static constexpr Held kHeld[8] = {{Holds::sums, 0}, {Holds::sums, 0}, {Holds::sums, 0},   {Holds::sums, 0},
                                    {Holds::sums, 0}, {Holds::sums, 0}, {Holds::inputs, 0}, {Holds::panel, 0}};
  Shapes shapes_;
};
