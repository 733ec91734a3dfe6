// y = x W^T for few rows of x and a float weight that lies row by row, as torch stores it; bound by its memory.
#pragma once

template <class V, class T, int M>
struct Dense {
  static constexpr int tall = M <= 2 ? 4 : 2;  // rows of W that are multiplied together
  using F = typename V::F;

  static ALWAYS_INLINE F load(const T* p, int64_t count) {
    if constexpr (sizeof(T) == 2) return load_bfloat<V>(p, count);
    else return load_float<V>(p, count);
  }

  // The products of `tall` rows of W from row n on with all rows of x, in column `column` of out (M, 16).
  static ALWAYS_INLINE void some(const Matrix& w, const Rows& x, int64_t n, float (*out)[kPanel], int64_t column) {
    const T* rows[tall];
    F sums[tall][M];
    UNROLL for (int r = 0; r < tall; ++r) {
      rows[r] = static_cast<const T*>(w.values) + min(n + r, w.rows - 1) * w.inputs;
      UNROLL for (int m = 0; m < M; ++m) sums[r][m] = V::zero();
    }
    for (int64_t k = 0; k < w.inputs; k += kHalf) {
      UNROLL for (int r = 0; r < tall; ++r) {
        const F weight = load(rows[r] + k, w.inputs - k);
        UNROLL for (int m = 0; m < M; ++m) {
          sums[r][m] = V::fma(weight, V::load(x.values + min(m, x.count - 1) * x.stride + k), sums[r][m]);
        }
      }
    }
    for (int r = 0; r < tall; ++r)
      for (int m = 0; m < M; ++m) out[m][column + r] = V::total(sums[r][m]);
  }

  static void run(const Matrix& w, const Rows& x, const Output& y, int64_t first, int64_t last) {
    float out[M][kPanel];
    for (int64_t p = first; p < last; ++p) {
      for (int64_t r = 0; r < kPanel; r += tall) some(w, x, p * kPanel + r, out, r);
      for (int64_t m = 0; m < x.count; ++m) write<V>(y, w.rows, m, p, V::load(out[m]));
    }
  }
};

template <class V, class T>
void few_dense_of(const Matrix& w, const Rows& x, const Output& y, int64_t first, int64_t last) {
  if (!V::registers || x.count == 1) {
    for (int64_t m = 0; m < x.count; ++m)
      Dense<V, T, 1>::run(w, {x.values + m * x.stride, 1, x.stride}, y.from(m), first, last);
  } else if constexpr (V::registers) {
    if (x.count == 2) Dense<V, T, 2>::run(w, x, y, first, last);
    else if (x.count <= 4) Dense<V, T, 4>::run(w, x, y, first, last);
    else Dense<V, T, 8>::run(w, x, y, first, last);
  }
}

template <class V>
void few_dense(const Matrix& w, const Rows& x, const Output& y, int64_t first, int64_t last) {
  if (w.bfloat) few_dense_of<V, uint16_t>(w, x, y, first, last);
  else few_dense_of<V, float>(w, x, y, first, last);
}
