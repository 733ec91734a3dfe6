// The packed weight (N out, K in) that the kernels read, and the functions that each processor level provides.
//
// Sixteen output rows are a panel, one row per lane of a vector. 32 consecutive inputs of a panel are a block of `bits`
// vectors of 16 words; word w of lane n holds codes of row n (codes.h says which). Blocks of a panel follow one
// another, so that a product reads memory in order. Rows beyond N and inputs beyond K have code 0.
#pragma once
#include <cstdint>

namespace ptqbench {

constexpr int64_t kPanel = 16;  // output rows of a panel
constexpr int64_t kBlock = 32;  // inputs of a block
constexpr int64_t kHalf = 16;   // inputs that are decoded together; groups are multiples of it
constexpr int64_t kFew = 8;     // rows of x up to which codes are decoded in registers

enum class Scale { float32, float16, bfloat16 };

// The codes of a weight.
struct Panels {
  const uint8_t* codes;  // (panels, blocks, bits, 16) words of 32 bits
  int bits;
  int64_t rows, inputs;  // N, K

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t halves() const { return (inputs + kHalf - 1) / kHalf; }
  const uint8_t* panel(int64_t p) const { return codes + p * blocks() * bits * 64; }
};

struct Weight : Panels {
  const float* levels;  // value of each code for bits <= 5, padded to 16 or 32; codes of more bits are numbers
  int exponent;         // bits of exponent, if codes of 6 or 8 bits are floats; 0: they are signed integers
  const void* scale;    // (panels, groups, 16)
  const void* zero;     // likewise, in units of levels; null: no zero points
  Scale scale_type;
  int64_t groups, group;  // number of groups, inputs of a group
  bool integers;          // whether levels are consecutive integers
  float lowest;           // the lowest of them
};

// How many rows of x lie in stacks: at most so many in one, and whether a row's words of a tile follow one another.
struct Order {
  int64_t tall;
  bool by_rows;
};

// Rows of x in float32 that can be read up to a multiple of 16 inputs, with zeros beyond K.
struct Rows {
  const float* values;
  int64_t count, stride;
};

// A float weight (rows, inputs), row by row.
struct Matrix {
  const void* values;
  bool bfloat;  // bfloat16, not float32
  int64_t rows, inputs;
};

constexpr int64_t kMany = 512;   // most rows of x at once: their sums stay in the cache
constexpr int64_t kSteps = 128;  // words of a tile of a panel: two panels are 16 KiB

// Many rows of x in words, in the order in which they are read: tiles of kSteps words of a row, and in a tile stacks of
// rows that are multiplied together, whose words lie step by step, or row by row. Zeros beyond K.
template <class Word>
struct Stacks {
  Word* words;  // (tiles, stacks, steps, rows of the stack, digits), or by rows (tiles, rows, digits, kSteps)
  int64_t count, stacks;
  int64_t steps;   // words of a row, or of each of its digits
  int64_t digits;  // words of a row in a step
  bool by_rows;

  int64_t tiles() const { return (steps + kSteps - 1) / kSteps; }
  int64_t first(int64_t stack) const { return stack * count / stacks; }          // row of a stack
  int64_t stack(int64_t row) const { return ((row + 1) * stacks - 1) / count; }  // in which a row lies
  Word* at(int64_t tile, int64_t row) const { return words + (tile * count + row) * kSteps * digits; }
};

// Where the words of a row lie: those of the next step `stride` later, those of the next digit `digit` later.
template <class Word>
struct Lane {
  Word* words;
  int64_t stride, digit;
};

// One pair of panels and the tiles [first, last) of its inputs, in a product with many rows of x. The second panel of
// the last pair may be missing.
struct Part {
  int64_t pair, first, last;
  void* sums;  // (rows, 2, 16) of the tiles before, unless there are none, and then of these, in 4 bytes each; aligned
};

// A weight of one scale per row, for inputs of 8 bits: codes of 2, 4 or 8 bits, without a sign.
struct ByteWeight : Panels {
  const float* scale;   // (panels, 16)
  const int32_t* zero;  // likewise
};

// The outlier channels of one row of x, which are multiplied in float32.
struct Outliers {
  const float* values;  // the row
  const int64_t* columns;
  int64_t count;
};

// Rows of x in codes of 8 bits with a sign, four a word.
struct ByteRows {
  Stacks<uint32_t> words;
  const float* scale;        // (rows,)
  const int32_t* sums;       // (rows,) of the codes
  const Outliers* outliers;  // (rows,) or null
};

constexpr int64_t kChunk = 64;  // inputs that share the unit of their digits

// Rows of x as sums of digits, see digits.h; `height` is 1, 2, 4 or 8, and rows beyond `count` have any values. Chunks
// follow one another within each group of the weight.
struct DigitRows {
  const uint32_t* words;  // (inputs / 4, height, digits): four inputs a word, zeros beyond K
  const float* units;     // (chunks, height)
  const float* sums;      // (chunks, height) of the inputs, in units
  int digits;             // 2 or 3
  int64_t count, height;
};

// Many rows of x as sums of digits; chunks of all rows have kChunk inputs.
struct DigitStacks {
  Stacks<uint32_t> words;  // four inputs a word
  float* units;            // (chunks, rows)
  float* sums;             // (chunks, rows) of the inputs, in units
};

// y (M, N) and the bias that is added to it.
struct Output {
  void* values;
  int64_t stride;
  const float* bias;  // (N,) or null
  bool bfloat;        // bfloat16, not float32

  Output from(int64_t row) const {
    return {static_cast<char*>(values) + row * stride * (bfloat ? 2 : 4), stride, bias, bfloat};
  }
};

// A matrix (K, 16 * panels) for decoded panels.
template <class T>
struct Slab {
  T* values;
  int64_t stride;
};

struct VectorLevel;   // of vectors.h
struct SearchLevel;   // of search.h
struct TrellisLevel;  // of trellis.h

struct Level {
  const char* name;
  // y = x W^T for the panels [first, last) and up to kFew rows of x; `sums` of x over groups (rows, groups) are read
  // only for weights with zero points
  void (*few)(const Weight&, const Rows& x, const float* sums, const Output& y, int64_t first, int64_t last);
  // likewise for a float weight
  void (*few_dense)(const Matrix&, const Rows& x, const Output& y, int64_t first, int64_t last);
  // y = x W^T for integer levels and up to kFew rows of x in digits; null where products in float32 are faster
  void (*few_digits)(const Weight&, const DigitRows& x, const Output& y, int64_t first, int64_t last);
  // the digits of a chunk of x, see digits.h
  float (*split_chunk)(const float* values, int64_t halves, int digits, const Lane<uint32_t>& to, float* sum);
  Order floats;     // of x in float32
  Order words;      // of x in bfloat16, and of x in codes
  Order digits[2];  // of x in two digits, and in three
  // the words of a stack of `height` rows, kSteps words each, step by step; null where `many` is
  void (*interleave)(const uint32_t* rows, int64_t height, int64_t steps, uint32_t* out);
  // y = x W^T for a part and up to kMany rows, written after the last tile; null where a library's product is used
  void (*many)(const Weight&, const Stacks<float>& x, const Part&, const Output& y);
  // likewise for x in bfloat16, two inputs a word
  void (*many_bf16)(const Weight&, const Stacks<uint32_t>& x, const Part&, const Output& y);
  // likewise for integer levels, and x in digits; null where products in float32 are faster
  void (*many_digits)(const Weight&, const DigitStacks& x, const Part&, const Output& y);
  // W^T of the panels [first, last)
  void (*decode)(const Weight&, int64_t first, int64_t last, const Slab<float>&);
  void (*decode_bf16)(const Weight&, int64_t first, int64_t last, const Slab<uint16_t>&);
  // likewise for x in codes
  void (*bytes)(const ByteWeight&, const ByteRows& x, const Part&, const Output& y);
  // largest magnitude of `count` values, a multiple of 16
  float (*absmax)(const float* values, int64_t count);
  // codes of `count` values, a multiple of 16: round(value / scale) clipped to [low, high], those of four neighbours in
  // a word, each four `stride` words after the ones before. Returns: their sum
  int32_t (*encode)(const float* values, int64_t count, float scale, float low, float high, uint32_t* words,
                    int64_t stride);
  const VectorLevel* vectors;
  const SearchLevel* search;
  const TrellisLevel* trellis;
};

const Level& plain_level();
const Level& avx2_level();
const Level& avx512_level();
const Level& avx512_vnni_level();
const Level& avx512_bf16_level();
const Level& amx_level();

}  // namespace ptqbench
