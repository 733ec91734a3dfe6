// y = x W^T for few rows of x and a weight of vectors: a vector is read from its table and multiplied at once.
#pragma once

// Adds the products of the vectors j and j + 1 of a row with M rows of x to every `chains`-th sum from the first on.
template <class V, int M, int chains, class Point, class Code>
ALWAYS_INLINE void add_pair(const Point* table, const Code* codes, int64_t j, const float* const* x,
                            typename V::F* sums) {
  const typename V::F value = points<V>(table, codes + j);
  UNROLL for (int m = 0; m < M; ++m) sums[m * chains] = V::fma(V::load(x[m] + j * kVector), value, sums[m * chains]);
}

// Adds the products of one row of a book with M rows of x to totals, which lie 16 floats apart.
template <class V, int M, class Point, class Code>
ALWAYS_INLINE void add_row(const Point* table, const Code* codes, int64_t count, const float* const* x, float factor,
                           float* totals) {
  constexpr int chains = M <= 2 ? 2 : 1;  // independent sums, because a product has a latency
  typename V::F sums[M * chains];
  UNROLL for (int i = 0; i < M * chains; ++i) sums[i] = V::zero();
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    add_pair<V, M, chains>(table, codes, j, x, sums);
    add_pair<V, M, chains>(table, codes, j + 2, x, sums + chains - 1);
  }
  if (j < count) add_pair<V, M, chains>(table, codes, j, x, sums);
  UNROLL for (int m = 0; m < M; ++m) {
    const typename V::F sum = chains == 2 ? V::add(sums[m * chains], sums[m * chains + 1]) : sums[m * chains];
    totals[m * kPanel] += factor * V::total(sum);
  }
}

template <class V, int M>
void few_panel(const Vectors& w, const Rows& x, const Output& y, int64_t p) {
  alignas(64) float totals[M * kPanel] = {};
  const float* inputs[M];
  for (int64_t m = 0; m < M; ++m) inputs[m] = x.values + min(m, x.count - 1) * x.stride;
  const int64_t first = p * kPanel, rows = min(kPanel, w.rows - first);
  for (int64_t b = 0; b < w.count; ++b) {
    typed(w.books[b], w, first, [&](const auto* table, const auto* codes) {
      for (int64_t r = 0; r < rows; ++r)
        add_row<V, M>(table, codes + r * w.stride, w.stride, inputs, w.books[b].factor, totals + r);
    });
  }
  for (int64_t m = 0; m < x.count; ++m) {
    typename V::F total = V::load(totals + m * kPanel);
    if (w.scale) total = V::mul(total, V::load(w.scale + first, rows));
    write<V>(y, w.rows, m, p, total);
  }
}

template <class V, int M>
void few_panels(const Vectors& w, const Rows& x, const Output& y, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) few_panel<V, M>(w, x, y, p);
}

template <class V>
void few_vectors(const Vectors& w, const Rows& x, const Output& y, int64_t first, int64_t last) {
  if (x.count == 1) few_panels<V, 1>(w, x, y, first, last);
  else if (x.count == 2) few_panels<V, 2>(w, x, y, first, last);
  else if (x.count <= 4) few_panels<V, 4>(w, x, y, first, last);
  else few_panels<V, 8>(w, x, y, first, last);
}
