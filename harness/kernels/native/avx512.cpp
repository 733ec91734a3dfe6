// The kernels for AVX-512 (F, BW, DQ, VL).
#include <cstdint>

#include "search.h"
#include "trellis.h"
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
#include "transpose.h"
#include "vectors_many.h"
#include "basis.h"
}  // namespace

const Level& avx512_level() {
  static const VectorLevel vectors = [] {
    VectorLevel all = vector_basis<V>();
    all.many = many_vectors<FloatProduct>;
    return all;
  }();
  static const Level level = [] {
    Level all = basis<V>("avx512", vectors, search_avx512(), trellis_avx512());
    all.interleave = interleave;
    all.many = many<FloatProduct>;
    return all;
  }();
  return level;
}

}  // namespace ptqbench
