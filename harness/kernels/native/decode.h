// W^T of some panels, decoded: weight = (level(code) - zero) scale in float32, as harness.core.formats decodes it.
#pragma once

// Calls store(k, values of the panel's 16 rows) for the inputs [first, last) of panel p, multiples of 16.
template <class V, class Kind, class Store>
ALWAYS_INLINE void decode_panel(const Weight& w, int64_t p, int64_t first, int64_t last, Store&& store) {
  constexpr int bits = Kind::bits;
  const Levels<V, bits> levels(w.levels);
  const uint8_t* codes = w.panel(p);
  for (int64_t k0 = first; k0 < last; k0 += kHalf) {
    const int64_t at = (p * w.groups + k0 / w.group) * kPanel, half = k0 / kHalf;
    const typename V::F scale = load_scale<V>(w.scale, w.scale_type, at);
    const typename V::F zero = w.zero ? load_scale<V>(w.zero, w.scale_type, at) : V::zero();
    const uint8_t* block = codes + half / 2 * bits * 64;
    if (half % 2 == 0) prefetch_pair<bits>(w, block);
    each_value<V, Kind>(block, half & 1, levels,
                        [&](auto k, typename V::F value) { store(k0 + k.value, V::mul(V::sub(value, zero), scale)); });
  }
}

template <class V, class T>
void decode(const Weight& w, int64_t first, int64_t last, const Slab<T>& slab) {
  with_kind(w, [&](auto kind) {
    for (int64_t p = first; p < last; ++p) {
      T* column = slab.values + (p - first) * kPanel;
      decode_panel<V, decltype(kind)>(w, p, 0, w.halves() * kHalf, [&](int64_t k, typename V::F value) {
        if (k < w.inputs) V::store(column + k * slab.stride, value);
      });
    }
  });
}
