// The kernels for AVX-512 with products of bytes (VNNI).
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "weight.h"

#define PTQBENCH_VNNI  // the compiler defines its own macro only by command line options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

namespace ptqbench {
namespace {
#include "common.h"
#include "vector_avx512.h"
#include "codes.h"
#include "parts.h"
#include "output.h"
#include "product.h"
#include "bytes.h"
#include "digits.h"
#include "many_digits.h"
}  // namespace

const Level& avx512_vnni_level() {
  static const Level level = [] {
    Level copy = avx512_level();
    copy.name = "avx512_vnni";
    copy.few_digits = few_digits<V>;
    copy.split_chunk = split_chunk<V>;
    copy.many_digits = many_digits<DigitRegisters>;
    copy.bytes = bytes<V, ByteProduct<V>>;
    return copy;
  }();
  return level;
}

}  // namespace ptqbench
