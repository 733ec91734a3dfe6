// The search for the codes of additive codebooks: what the levels of processor features share with its operators.
#pragma once
#include <cstdint>

namespace ptqbench {

// One group of 8 weights: M codebooks of E entries, E a multiple of 256, and the most candidates of a row.
struct Search {
  int64_t books, entries, beam;
  const float* vectors;  // (M, E, 8)
  const float* norms;    // (M, E)
  const float* tables;   // (M, 8, E), the vectors times -2
};

// The codes (M, n) and gaps (n, 8) of n rows before and after the search; a row of codes has `stride` values.
struct SearchedRows {
  const int64_t* codes;
  int64_t stride;
  const float* gaps;
  int64_t* chosen;
  int64_t chosen_stride;
  float* remaining;
};

struct SearchLevel {
  // Searches rows [first, last), with memory for `search_floats` and `search_integers` values.
  void (*search)(const Search&, const SearchedRows&, int64_t first, int64_t last, float* floats, int64_t* integers);
  // Scores (E,) of one target (8,) for one codebook, see `_Run._scores`.
  void (*scores)(const float* target, const float* norms, const float* table, int64_t entries, float* scores);
};

inline int64_t search_floats(const Search& s) { return s.beam * (16 + s.entries + s.entries / 256); }
inline int64_t search_integers(const Search& s) { return s.beam * (2 * s.books + 1); }

const SearchLevel& search_plain();
const SearchLevel& search_avx2();
const SearchLevel& search_avx512();

// |x|^2 of eight values, in the order in which torch sums eight.
inline float squared_length(const float* x) {
  float sum = x[0] * x[0];
  for (int k = 1; k < 8; ++k) sum += x[k] * x[k];
  return sum;
}

}  // namespace ptqbench
