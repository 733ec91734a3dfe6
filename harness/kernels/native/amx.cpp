// The kernels for processors with a matrix engine (AMX).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

#define PTQBENCH_VNNI  // the compiler defines its own macro only by command line options
#pragma GCC target("amx-tile,amx-int8,amx-bf16,avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
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
#include "bytes.h"
#include "points.h"
#include "transpose.h"
#include "vectors_many.h"
#include "digits.h"
#include "many_digits.h"
#include "matrix.h"
}  // namespace

const Level& amx_level() {
  static const Level level = [] {
    Level copy = avx512_bf16_level();
    copy.name = "amx";
    copy.words = {kMatrixRows, true};
    for (Order& order : copy.digits) order = {kPanel, true};
    copy.many_bf16 = many<BfloatMatrix>;
    copy.bytes = bytes<V, ByteMatrix>;
    copy.many_digits = many_digits<DigitEngine>;
    static VectorLevel vectors = *copy.vectors;
    vectors.many_bf16 = many_vectors<BfloatMatrix>;
    copy.vectors = &vectors;
    return copy;
  }();
  return level;
}

}  // namespace ptqbench
