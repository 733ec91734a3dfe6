// The kernels for AVX-512 (F, BW, DQ, VL).
#include <cstdint>

#include "search.h"
#include "vectors.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"
#include "vector_avx512.h"
#include "codes.h"
#include "parts.h"
#include "output.h"
#include "few.h"
#include "dense.h"
#include "decode.h"
#include "product.h"
#include "product_float.h"
#include "bytes.h"
#include "points.h"
#include "vectors_few.h"
#include "hadamard.h"
#include "vectors_many.h"
}  // namespace

const Level& avx512_level() {
  static const VectorLevel vectors = [] {
    VectorLevel all{};
    all.few = few_vectors<V>;
    all.many = many_vectors<FloatProduct>;
    all.decode = decode_rows<V, float>;
    all.decode_bf16 = decode_rows<V, uint16_t>;
    all.enter = enter<V>;
    all.leave = leave<V>;
    return all;
  }();
  static const Level level = [] {
    Level all{};
    all.name = "avx512";
    all.few = few<V>;
    all.few_dense = few_dense<V>;
    all.many = many<FloatProduct>;
    all.decode = decode<V, float>;
    all.decode_bf16 = decode<V, uint16_t>;
    all.bytes = bytes<V>;
    all.absmax = absmax<V>;
    all.encode = encode<V>;
    all.vectors = &vectors;
    all.search = &search_avx512();
    return all;
  }();
  return level;
}

}  // namespace ptqbench
