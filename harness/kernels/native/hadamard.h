// Orthogonal transforms of one row, the Kronecker product of a dense matrix and a Sylvester matrix: see
// harness.core.hadamard, which defines the matrices. Time is that of the dense part, order sums a value.
#pragma once

// x in groups of `size` values, each transformed by the Sylvester matrix of that size, 16 or more.
template <class V>
ALWAYS_INLINE void butterflies_between(float* x, int64_t count, int64_t stride) {
  for (int64_t start = 0; start < count; start += 2 * stride) {
    for (int64_t j = start; j < start + stride; j += kHalf) {
      const typename V::F a = V::load(x + j), b = V::load(x + j + stride);
      V::store(x + j, V::add(a, b));
      V::store(x + j + stride, V::sub(a, b));
    }
  }
}

// Two steps at once, which halves the loads and stores: strides 2 s and s.
template <class V>
ALWAYS_INLINE void butterflies_of_four(float* x, int64_t count, int64_t s) {
  for (int64_t start = 0; start < count; start += 4 * s) {
    for (int64_t j = start; j < start + s; j += kHalf) {
      const typename V::F a = V::load(x + j), b = V::load(x + j + s);
      const typename V::F c = V::load(x + j + 2 * s), d = V::load(x + j + 3 * s);
      const typename V::F ac = V::add(a, c), bd = V::add(b, d), a_c = V::sub(a, c), b_d = V::sub(b, d);
      V::store(x + j, V::add(ac, bd));
      V::store(x + j + s, V::sub(ac, bd));
      V::store(x + j + 2 * s, V::add(a_c, b_d));
      V::store(x + j + 3 * s, V::sub(a_c, b_d));
    }
  }
}

// The lanes whose index has the bit `step`: x becomes the other lane minus x; the others: the sum.
template <class V, int step>
ALWAYS_INLINE typename V::F butterfly(typename V::F x, typename V::F signs) {
  return V::fma(x, signs, V::template swapped<step>(x));
}

template <class V>
ALWAYS_INLINE typename V::F signs_of(int step) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i & step ? -1.0f : 1.0f;
  return V::load(lanes);
}

template <class V>
void sylvester(float* x, int64_t count, int64_t size) {
  int64_t stride = size / 2;
  for (; stride >= 2 * kHalf; stride /= 4) butterflies_of_four<V>(x, count, stride / 2);
  if (stride == kHalf) butterflies_between<V>(x, count, stride);
  const typename V::F one = signs_of<V>(1), two = signs_of<V>(2), four = signs_of<V>(4), eight = signs_of<V>(8);
  for (int64_t i = 0; i < count; i += kHalf) {
    const typename V::F a = butterfly<V, 2>(butterfly<V, 1>(V::load(x + i), one), two);
    V::store(x + i, butterfly<V, 8>(butterfly<V, 4>(a, four), eight));
  }
}

inline void short_sylvester(float* x, int64_t count, int64_t size) {
  for (int64_t stride = 1; stride < size; stride *= 2) {
    for (int64_t i = 0; i < count; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}

// Results [first, first + height) of the dense matrix A, each of `size` values: y[i'] = sum over i of A[i, i'] x[i].
template <class V, int height>
ALWAYS_INLINE void dense_rows(const Rotation& q, const float* x, float* y, int64_t first, int64_t size) {
  for (int64_t j = 0; j < size; j += kHalf) {
    typename V::F sums[height];
    UNROLL for (int t = 0; t < height; ++t) sums[t] = V::zero();
    for (int64_t i = 0; i < q.order; ++i) {
      const typename V::F value = V::load(x + i * size + j);
      const float* row = q.matrix + i * q.order + first;
      UNROLL for (int t = 0; t < height; ++t) sums[t] = V::fma(V::broadcast(row[t]), value, sums[t]);
    }
    UNROLL for (int t = 0; t < height; ++t) V::store(y + (first + t) * size + j, sums[t]);
  }
}

template <class V>
void dense(const Rotation& q, const float* x, float* y, int64_t size) {
  int64_t first = 0;
  constexpr int most = V::tall;  // results whose sums stay in registers
  if constexpr (most > 4)
    for (; first + most <= q.order; first += most) dense_rows<V, most>(q, x, y, first, size);
  for (; first + 4 <= q.order; first += 4) dense_rows<V, 4>(q, x, y, first, size);
  for (; first < q.order; ++first) dense_rows<V, 1>(q, x, y, first, size);
}

inline void short_dense(const Rotation& q, const float* x, float* y, int64_t size) {
  for (int64_t i = 0; i < q.size; ++i) y[i] = 0;
  for (int64_t j = 0; j < size; ++j)
    for (int64_t i = 0; i < q.order; ++i)
      for (int64_t to = 0; to < q.order; ++to) y[to * size + j] += q.matrix[i * q.order + to] * x[i * size + j];
}

// The transform of x, in x or in `memory`, without its norm.
template <class V>
float* rotated(const Rotation& q, float* x, float* memory) {
  const int64_t size = q.size / q.order;
  if (q.matrix) {
    if (size >= kHalf) dense<V>(q, x, memory, size);
    else short_dense(q, x, memory, size);
    x = memory;
  }
  if (size >= kHalf) sylvester<V>(x, q.size, size);
  else short_sylvester(x, q.size, size);
  return x;
}

template <class V>
void enter(const Rotation& q, const void* x, bool bfloat, float* memory, void* out, bool out_bfloat) {
  for (int64_t i = 0; i < q.size; i += kHalf) {
    const int64_t count = q.size - i;
    const typename V::F value = bfloat ? load_bfloat<V>(static_cast<const uint16_t*>(x) + i, count)
                                       : load_float<V>(static_cast<const float*>(x) + i, count);
    store_part<V>(memory + i, V::mul(value, load_half<V>(q.factors + i, count)), count);
  }
  const float* result = rotated<V>(q, memory, memory + q.size);
  for (int64_t i = 0; i < q.size; i += kHalf)
    store_as<V>(out, out_bfloat, i, V::mul(load_float<V>(result + i, q.size - i), V::broadcast(q.norm)), q.size - i);
}

template <class V>
void leave(const Rotation& q, float* row, float* memory, const float* bias, void* y, bool bfloat) {
  const float* result = rotated<V>(q, row, memory);
  for (int64_t i = 0; i < q.size; i += kHalf) {
    const int64_t count = q.size - i;
    const typename V::F factor = V::mul(load_half<V>(q.factors + i, count), V::broadcast(q.norm));
    typename V::F value = V::mul(load_float<V>(result + i, count), factor);
    if (bias) value = V::add(value, load_float<V>(bias + i, count));
    store_as<V>(y, bfloat, i, value, count);
  }
}
