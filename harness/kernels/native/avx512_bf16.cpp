// The kernels for AVX-512 with products of bytes and of bfloat16.
#include <cstdint>

#include "vectors.h"

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"
#include "vector_avx512.h"
#include "codes.h"
#include "parts.h"
#include "output.h"
#include "decode.h"
#include "product.h"
#include "product_bfloat.h"
#include "points.h"
#include "transpose.h"
#include "vectors_many.h"

}  // namespace

const Level& avx512_bf16_level() {
  static const Level level = [] {
    Level copy = avx512_vnni_level();
    copy.name = "avx512_bf16";
    copy.many_bf16 = many<BfloatProduct>;
    static VectorLevel vectors = *copy.vectors;
    vectors.many_bf16 = many_vectors<BfloatProduct>;
    copy.vectors = &vectors;
    return copy;
  }();
  return level;
}

}  // namespace ptqbench
