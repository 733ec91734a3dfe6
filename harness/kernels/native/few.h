// y = x W^T for few rows of x: codes are decoded in registers and multiplied at once; bound by the memory of the codes.
//
//   y[m, n] = sum over groups g of scale[n, g] (sum_k level(code[n, k]) x[m, k] - zero[n, g] sum_k x[m, k])
#pragma once

template <class V, class Kind, int M>
struct Few {
  static constexpr int bits = Kind::bits;
  static constexpr int chains = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums, because a product has a latency

  static void panel(const Weight& w, const Rows& x, const float* group_sums, int64_t p, typename V::F (&total)[M]) {
    const Levels<V, bits> levels(w.levels);
    const uint8_t* codes = w.panel(p);
    int64_t half = 0, row[M];
    for (int m = 0; m < M; ++m) {
      total[m] = V::zero();
      row[m] = min(m, x.count - 1);  // rows that are not there repeat the last one
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      typename V::F sums[M * chains];
      for (int i = 0; i < M * chains; ++i) sums[i] = V::zero();
      const int64_t end = min((g + 1) * (w.group / kHalf), w.halves());
      for (; half < end; ++half) {
        const float* inputs = x.values + half * kHalf;
        if (half % 2 == 0) prefetch<bits>(codes + half / 2 * bits * 64);
        each_value<V, Kind>(codes + half / 2 * bits * 64, half & 1, levels, [&](auto k, typename V::F value) {
          UNROLL for (int m = 0; m < M; ++m) {
            auto& sum = sums[m * chains + k.value % chains];
            sum = V::fma(V::broadcast(inputs[row[m] * x.stride + k.value]), value, sum);
          }
        });
      }
      const int64_t at = (p * w.groups + g) * kPanel;
      const typename V::F scale = load_scale<V>(w.scale, w.scale_type, at);
      for (int m = 0; m < M; ++m) {
        typename V::F sum = sums[m * chains];
        for (int c = 1; c < chains; ++c) sum = V::add(sum, sums[m * chains + c]);
        if (w.zero) {
          const typename V::F zero = load_scale<V>(w.zero, w.scale_type, at);
          sum = V::fnma(zero, V::broadcast(group_sums[row[m] * w.groups + g]), sum);
        }
        total[m] = V::fma(sum, scale, total[m]);
      }
    }
  }

  static void run(const Weight& w, const Rows& x, const float* group_sums, const Output& y, int64_t first,
                  int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      typename V::F total[M];
      panel(w, x, group_sums, p, total);
      for (int m = 0; m < x.count; ++m) write<V>(y, w.rows, m, p, total[m]);
    }
  }
};

template <class V, class Kind>
void one_by_one(const Weight& w, const Rows& x, const float* group_sums, const Output& y, int64_t first, int64_t last) {
  for (int64_t m = 0; m < x.count; ++m)
    Few<V, Kind, 1>::run(w, {x.values + m * x.stride, 1, x.stride}, group_sums + m * w.groups, y.from(m), first, last);
}

template <class V>
void few(const Weight& w, const Rows& x, const float* group_sums, const Output& y, int64_t first, int64_t last) {
  with_kind(w, [&](auto kind) {
    using K = decltype(kind);
    if constexpr (!V::registers) one_by_one<V, K>(w, x, group_sums, y, first, last);
    else if (x.count == 1) Few<V, K, 1>::run(w, x, group_sums, y, first, last);
    else if (x.count == 2) Few<V, K, 2>::run(w, x, group_sums, y, first, last);
    else if (x.count <= 4) Few<V, K, 4>::run(w, x, group_sums, y, first, last);
    else Few<V, K, 8>::run(w, x, group_sums, y, first, last);
  });
}
