// The functions that every level has, with the vectors of its own processor.
#pragma once

template <class V>
VectorLevel vector_basis() {
  VectorLevel level{};
  level.few = few_vectors<V>;
  level.decode = decode_rows<V, float>;
  level.decode_bf16 = decode_rows<V, uint16_t>;
  level.enter = enter<V>;
  level.leave = leave<V>;
  return level;
}

template <class V>
Level basis(const char* name, const VectorLevel& vectors, const SearchLevel& search, const TrellisLevel& trellis) {
  Level level{};
  level.name = name;
  level.few = few<V>;
  level.few_dense = few_dense<V>;
  level.floats = level.words = {V::tall, false};
  for (int i = 0; i < 2; ++i) level.digits[i] = {V::tall / (i + 2), false};
  level.decode = decode<V, float>;
  level.decode_bf16 = decode<V, uint16_t>;
  level.bytes = bytes<V, ByteProduct<V>>;
  level.absmax = absmax<V>;
  level.encode = encode<V>;
  level.vectors = &vectors;
  level.search = &search;
  level.trellis = &trellis;
  return level;
}
