// The kernels for any processor: a vector is an array.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "search.h"
#include "trellis.h"
#include "vectors.h"

#define ALWAYS_INLINE inline  // arrays of 16 lanes, unrolled 16 times, would be slow to compile

namespace ptqbench {
namespace {
#include "common.h"

// clang-format off: an operation a line
struct V {
  static constexpr bool registers = false;  // whether several sums stay in registers
  static constexpr int tall = 1;            // rows of x that are multiplied together
  struct F {
    float lane[16];
  };
  struct I {
    uint32_t lane[16];
  };
  template <class R, class Function>
  static ALWAYS_INLINE R lanes(Function&& function) {
    R result;
    for (int i = 0; i < 16; ++i) result.lane[i] = function(i);
    return result;
  }
  static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }
  static float half_of(uint32_t half) {  // exact: the exponent is corrected by a product with 2^112
    const float magnitude = float_of((half & 0x7FFF) << 13) * 0x1p112f;
    return half & 0x8000 ? -magnitude : magnitude;
  }
  static I load(const uint8_t* p) {
    I a;
    std::memcpy(a.lane, p, 64);
    return a;
  }
  static F load(const float* p) { return lanes<F>([&](int i) { return p[i]; }); }
  static F load_half(const uint16_t* p) { return lanes<F>([&](int i) { return half_of(p[i]); }); }
  static F load_bfloat(const uint16_t* p) {
    return lanes<F>([&](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
  }
  static void store(float* p, F a) { std::memcpy(p, a.lane, 64); }
  static void store(float* p, F a, int64_t count) { std::memcpy(p, a.lane, static_cast<size_t>(4 * count)); }
  static F load(const float* p, int64_t count) {
    F a = zero();
    std::memcpy(a.lane, p, static_cast<size_t>(4 * count));
    return a;
  }
  static void store(uint16_t* p, F a, int64_t count) {
    uint16_t lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, static_cast<size_t>(2 * count));
  }
  static void store(uint16_t* p, F a) {  // rounds to bfloat16, to nearest even
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = bits_of(a.lane[i]);
      p[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
  }
  template <int s>
  static I right(I a) { return lanes<I>([&](int i) { return a.lane[i] >> s; }); }
  template <int s>
  static I left(I a) { return lanes<I>([&](int i) { return a.lane[i] << s; }); }
  template <int s>
  static I arithmetic(I a) {
    return lanes<I>([&](int i) { return static_cast<uint32_t>(static_cast<int32_t>(a.lane[i]) >> s); });
  }
  static I either(I a, I b) { return lanes<I>([&](int i) { return a.lane[i] | b.lane[i]; }); }
  template <uint32_t mask>
  static I merge(I a, I b) {
    return lanes<I>([&](int i) { return (a.lane[i] & mask) | (b.lane[i] & ~mask); });
  }
  static F lookup(F table, I index) { return lanes<F>([&](int i) { return table.lane[index.lane[i] & 15]; }); }
  static F lookup(F low, F high, I index) {
    return lanes<F>([&](int i) { return (index.lane[i] & 16 ? high : low).lane[index.lane[i] & 15]; });
  }
  static F to_float(I a) {
    return lanes<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.lane[i])); });
  }
  static uint32_t lane_of_16(I a, int i) { return a.lane[i / 2] >> (i % 2 * 16) & 0xFFFF; }
  template <int s>
  static I left_of_16(I a) {  // of 32 lanes of 16 bits
    return lanes<I>([&](int i) { return (a.lane[i] & 0xFFFF0000) << s | (a.lane[i] << s & 0xFFFF); });
  }
  template <int s>
  static I arithmetic_of_16(I a) {
    return lanes<I>([&](int i) {
      const int32_t low = static_cast<int16_t>(a.lane[i]), high = static_cast<int32_t>(a.lane[i]) >> 16;
      return (static_cast<uint32_t>(high >> s) << 16) | (static_cast<uint32_t>(low >> s) & 0xFFFF);
    });
  }
  template <int part>
  static F widened(I halves) {  // 16 of 32 float16
    return lanes<F>([&](int i) { return half_of(lane_of_16(halves, 16 * part + i)); });
  }
  static F zero() { return broadcast(0); }
  static F broadcast(float a) { return lanes<F>([&](int) { return a; }); }
  static F add(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static F sub(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static F mul(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static F fma(F a, F b, F c) { return lanes<F>([&](int i) { return c.lane[i] + a.lane[i] * b.lane[i]; }); }
  static F fnma(F a, F b, F c) { return lanes<F>([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; }); }
  static F div(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] / b.lane[i]; }); }
  static F larger(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static F smaller(F a, F b) { return lanes<F>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static F magnitude(F a) { return lanes<F>([&](int i) { return std::fabs(a.lane[i]); }); }
  static F round(F a) { return lanes<F>([&](int i) { return std::nearbyint(a.lane[i]); }); }
  static void store_bytes(int8_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
  }
  static void store(uint8_t* p, I a) { std::memcpy(p, a.lane, 64); }
  static I integer(int32_t a) { return lanes<I>([&](int) { return static_cast<uint32_t>(a); }); }
  static I add(I a, I b) { return lanes<I>([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static I sub(I a, I b) { return lanes<I>([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static I times(I a, I b) { return lanes<I>([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static I both(I a, I b) { return lanes<I>([&](int i) { return a.lane[i] & b.lane[i]; }); }
  static I shifted(I a, int s) { return lanes<I>([&](int i) { return a.lane[i] >> s; }); }
  // Adds the products of four bytes, those of the weight without a sign, to the sum of each lane.
  static I dot4(I sum, I weight, I x) {
    return lanes<I>([&](int i) {
      int32_t products = 0;
      for (int s = 0; s < 32; s += 8)
        products += static_cast<int32_t>(weight.lane[i] >> s & 0xFF) * static_cast<int8_t>(x.lane[i] >> s);
      return sum.lane[i] + static_cast<uint32_t>(products);
    });
  }
  static float float_of_point(float value) { return value; }
  static float float_of_point(uint16_t value) { return half_of(value); }
  template <class Point>
  static F pair(const Point* a, const Point* b) {  // eight values at a and eight at b
    return lanes<F>([&](int i) { return float_of_point(i < 8 ? a[i] : b[i - 8]); });
  }
  static float with_sign(int8_t magnitude, int8_t sign) {
    return static_cast<float>((sign > 0 ? magnitude : -magnitude) + (sign == 1 || sign == -1 ? 1 : -1));
  }
  // The points of E8P of eight magnitudes at a and eight at b, see Points.
  static F signed_pair(const int8_t* a, const int8_t* b, const int8_t* a_signs, const int8_t* b_signs) {
    return lanes<F>([&](int i) { return i < 8 ? with_sign(a[i], a_signs[i]) : with_sign(b[i - 8], b_signs[i - 8]); });
  }
  static float total(F a) {
    float sum = 0;
    for (float lane : a.lane) sum += lane;
    return sum;
  }
  template <int step>
  static F swapped(F a) {  // lane i becomes lane i ^ step
    return lanes<F>([&](int i) { return a.lane[i ^ step]; });
  }
};
// clang-format on

#include "codes.h"
#include "parts.h"
#include "output.h"
#include "few.h"
#include "dense.h"
#include "decode.h"
#include "product.h"
#include "bytes.h"
#include "points.h"
#include "vectors_few.h"
#include "hadamard.h"
#include "basis.h"
}  // namespace

const Level& plain_level() {
  static const VectorLevel vectors = vector_basis<V>();
  static const Level level = basis<V>("plain", vectors, search_plain(), trellis_plain());
  return level;
}

}  // namespace ptqbench
