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
  static const VectorLevel vectors{few_vectors<V>, many_vectors<FloatProduct>, nullptr, decode_rows<V, float>,
                                   decode_rows<V, uint16_t>, enter<V>, leave<V>};
  static const Level level{"avx512", few<V>, few_dense<V>, nullptr, nullptr, many<FloatProduct>, nullptr, decode<V, float>, decode<V, uint16_t>,
                           bytes<V>, absmax<V>, encode<V>, &vectors, &search_avx512()};
  return level;
}

}  // namespace ptqbench
