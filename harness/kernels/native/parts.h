// Loads and stores at the end of a row: of 16 lanes, `count` are in memory, or all if it is 16 or more.
#pragma once

template <class V>
ALWAYS_INLINE typename V::F load_float(const float* p, int64_t count) {
  return count >= kHalf ? V::load(p) : V::load(p, count);
}

template <class V, class Load>
ALWAYS_INLINE typename V::F load_part(const uint16_t* p, int64_t count, Load&& load) {
  if (count >= kHalf) return load(p);
  uint16_t lanes[kHalf];
  for (int64_t i = 0; i < kHalf; ++i) lanes[i] = i < count ? p[i] : uint16_t{0};
  return load(lanes);
}

template <class V>
ALWAYS_INLINE typename V::F load_half(const uint16_t* p, int64_t count) {
  return load_part<V>(p, count, [](const uint16_t* lanes) { return V::load_half(lanes); });
}

template <class V>
ALWAYS_INLINE typename V::F load_bfloat(const uint16_t* p, int64_t count) {
  return load_part<V>(p, count, [](const uint16_t* lanes) { return V::load_bfloat(lanes); });
}

template <class V, class T>
ALWAYS_INLINE void store_part(T* p, typename V::F value, int64_t count) {
  if (count >= kHalf) V::store(p, value);
  else V::store(p, value, count);
}

// To element i of `out`, which is bfloat16 or float32.
template <class V>
ALWAYS_INLINE void store_as(void* out, bool bfloat, int64_t i, typename V::F value, int64_t count) {
  if (bfloat) store_part<V>(static_cast<uint16_t*>(out) + i, value, count);
  else store_part<V>(static_cast<float*>(out) + i, value, count);
}
