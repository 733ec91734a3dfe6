// The points of a weight of vectors, see vectors.h: two neighbouring ones fill a register of 16 lanes.
#pragma once

// Calls use(table, codes) with the types of a book; the codes are those from row `row` on.
template <class Use>
ALWAYS_INLINE void typed(const Book& book, const Vectors& w, int64_t row, Use&& use) {
  const auto* bytes = static_cast<const uint8_t*>(book.codes) + row * w.stride;
  const auto* words = static_cast<const uint16_t*>(book.codes) + row * w.stride;
  switch (book.points) {
    case Points::int8: return use(static_cast<const int8_t*>(book.table), words);
    case Points::float16: return use(static_cast<const uint16_t*>(book.table), words);
    default: return use(static_cast<const float*>(book.table), bytes);
  }
}

template <class V, class Point, class Code>
ALWAYS_INLINE typename V::F points(const Point* table, const Code* codes) {
  if constexpr (sizeof(Point) == 1) {
    const Point* signs = table + 256 * kVector;
    const int a = codes[0], b = codes[1];
    return V::signed_pair(table + kVector * (a >> 8), table + kVector * (b >> 8), signs + kVector * (a & 255),
                          signs + kVector * (b & 255));
  } else {
    return V::pair(table + kVector * codes[0], table + kVector * codes[1]);
  }
}

// The vectors [first, last) of a row, even numbers, in float32.
template <class V>
void decode_row(const Vectors& w, int64_t row, int64_t first, int64_t last, float* out) {
  for (int64_t b = 0; b < w.count; ++b) {
    const typename V::F factor = V::broadcast(w.books[b].factor * (w.scale ? w.scale[row] : 1));
    typed(w.books[b], w, row, [&](const auto* table, const auto* codes) {
      float* to = out;
      for (int64_t j = first; j < last; j += 2, to += kHalf) {
        const typename V::F value = V::mul(points<V>(table, codes + j), factor);
        V::store(to, b ? V::add(V::load(to), value) : value);
      }
    });
  }
}

// The rows [first, last) of W in the dtype of the slab (last - first, K).
template <class V, class T>
void decode_rows(const Vectors& w, int64_t first, int64_t last, T* slab) {
  constexpr int64_t kChunk = 32;  // vectors
  alignas(64) float values[kChunk * kVector];
  for (int64_t row = first; row < last; ++row) {
    for (int64_t j = 0; j < w.stride; j += kChunk) {
      decode_row<V>(w, row, j, min(j + kChunk, w.stride), values);
      T* to = slab + (row - first) * w.inputs + j * kVector;
      const int64_t count = min(kChunk * kVector, w.inputs - j * kVector);
      for (int64_t k = 0; k < count; k += kHalf) store_part<V>(to + k, V::load(values + k), count - k);
    }
  }
}
