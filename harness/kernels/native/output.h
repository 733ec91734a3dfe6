// Results of a panel to y, with the bias, in the dtype of y.
#pragma once

template <class V>
ALWAYS_INLINE void write(const Output& y, int64_t rows, int64_t m, int64_t panel, typename V::F value) {
  const int64_t first = panel * kPanel, count = min(kPanel, rows - first);
  if (count <= 0) return;
  if (y.bias) value = V::add(value, load_float<V>(y.bias + first, count));
  store_as<V>(y.values, y.bfloat, m * y.stride + first, value, count);
}
