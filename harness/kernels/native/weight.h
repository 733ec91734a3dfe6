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

struct Weight {
  const uint8_t* codes;  // (panels, blocks, bits, 16) words of 32 bits
  const float* levels;   // value of each code for bits <= 5, padded to 16 or 32; codes of more bits are signed integers
  const void* scale;     // (panels, groups, 16)
  const void* zero;      // likewise, in units of levels; null: no zero points
  Scale scale_type;
  int bits;
  int64_t rows, inputs;   // N, K
  int64_t groups, group;  // number of groups, inputs of a group

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t halves() const { return (inputs + kHalf - 1) / kHalf; }
  const uint8_t* panel(int64_t p) const { return codes + p * blocks() * bits * 64; }
};

// Rows of x in words, of one float32 or two bfloat16, that can be read up to a multiple of 16 inputs, with zeros beyond K.
template <class Word>
struct Rows {
  const Word* values;
  int64_t count, stride;
};

constexpr int64_t kTall = 12;   // rows of x that are multiplied together: 24 sums of 16 lanes fit into the registers
constexpr int64_t kMany = 240;  // most rows of x at once: their sums fit into the cache

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

struct Level {
  const char* name;
  // y = x W^T for the panels [first, last) and up to kFew rows of x; `sums` of x over groups (rows, groups) are read
  // only for weights with zero points
  void (*few)(const Weight&, const Rows<float>& x, const float* sums, const Output& y, int64_t first, int64_t last);
  // y = x W^T for the pairs of panels [first, last) and up to kMany rows; null where a library's product is used
  void (*many)(const Weight&, const Rows<float>& x, const Output& y, int64_t first, int64_t last);
  // likewise for x in bfloat16, two inputs a word
  void (*many_bf16)(const Weight&, const Rows<uint32_t>& x, const Output& y, int64_t first, int64_t last);
  // W^T of the panels [first, last)
  void (*decode)(const Weight&, int64_t first, int64_t last, const Slab<float>&);
  void (*decode_bf16)(const Weight&, int64_t first, int64_t last, const Slab<uint16_t>&);
};

const Level& plain_level();
const Level& avx2_level();
const Level& avx512_level();
const Level& avx512_bf16_level();

}  // namespace ptqbench
