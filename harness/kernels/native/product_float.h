// Products in float32, see product.h.
#pragma once

struct FloatProduct {
  using Word = float;
  using Sum = V::F;
  using Multiplier = Registers<FloatProduct>;
  static constexpr int64_t pack = 1;
  static ALWAYS_INLINE Sum zero() { return V::zero(); }
  static ALWAYS_INLINE Sum broadcast(float x) { return V::broadcast(x); }
  static ALWAYS_INLINE Sum load(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static ALWAYS_INLINE Sum add(Sum a, Sum b) { return V::add(a, b); }
  static ALWAYS_INLINE Sum dot(Sum sum, Sum weight, Sum x) { return V::fma(x, weight, sum); }
  // The words of 16 inputs of one row.
  static ALWAYS_INLINE Sum words(const float* inputs) { return V::load(inputs); }

  // The inputs [first, last) of panel p, 64 bytes each.
  template <class Kind>
  static void decode(const Weight& w, int64_t p, int64_t first, int64_t last, uint8_t* tile) {
    float* out = reinterpret_cast<float*>(tile);
    decode_panel<V, Kind>(w, p, first, last,
                          [&](int64_t k, Sum value) { V::store(out + (k - first) * kPanel, value); });
  }
};
