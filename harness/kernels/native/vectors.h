// A weight (N out, K in) of vectors of 8 inputs: each vector is a sum of points, one from the table of each book.
//
//   w[n, 8 j : 8 j + 8] = scale[n] sum over books b of factor_b table_b[codes_b[n, j]]
#pragma once
#include <cstdint>

#include "weight.h"

namespace ptqbench {

constexpr int64_t kVector = 8;  // inputs of a vector
constexpr int64_t kBooks = 8;   // most books of a weight

// What a table holds: points in float32 for codes of 8 bits, in float16 for codes of 16 bits; or, for E8P's codes of 16
// bits, int8 of 256 magnitudes, which the upper byte selects, and then of 256 signs, which the lower byte selects. A
// sign is 1 or -1 where 1 is added to the signed magnitude, 3 or -3 where 1 is subtracted.
enum class Points { int8, float16, float32 };

struct Book {
  const void* table;  // (entries, 8)
  const void* codes;  // (N, stride)
  Points points;
  float factor;
};

struct Vectors {
  Book books[kBooks];
  int64_t count;         // of books
  const float* scale;    // (N,) or null: 1
  int64_t rows, inputs;  // N, K
  int64_t stride;        // codes of a row, an even number; those beyond K / 8 are 0

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
};

// The orthogonal transform of a side: factors, then (or before) A (order, order) times a Sylvester matrix of the size
// size / order.
struct Rotation {
  const uint16_t* factors;  // (size,) float16
  const float* matrix;      // A; null: order is 1
  int64_t order, size;
  float norm;  // multiplies the result
};

struct VectorLevel {
  // y = x W^T for the panels [first, last) and up to kFew rows of x
  void (*few)(const Vectors&, const Rows& x, const Output& y, int64_t first, int64_t last);
  // y = x W^T for a part and up to kMany rows, written after the last tile; null where a library's product is used
  void (*many)(const Vectors&, const Stacks<float>& x, const Part&, const Output& y);
  // likewise for x in bfloat16, two inputs a word
  void (*many_bf16)(const Vectors&, const Stacks<uint32_t>& x, const Part&, const Output& y);
  // the rows [first, last) of W, (last - first, K)
  void (*decode)(const Vectors&, int64_t first, int64_t last, float* slab);
  void (*decode_bf16)(const Vectors&, int64_t first, int64_t last, uint16_t* slab);
  // one row of x, times the factors and transformed; `memory` holds twice its size
  void (*enter)(const Rotation&, const void* x, bool bfloat, float* memory, void* out, bool out_bfloat);
  // one row transformed, times the factors, plus the bias (or null), to y; `row` is overwritten
  void (*leave)(const Rotation&, float* row, float* memory, const float* bias, void* y, bool bfloat);
};

}  // namespace ptqbench
