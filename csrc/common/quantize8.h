// Optimizer moments in 8 bits: 256 codes of one byte share one float, the largest magnitude of their block.
//
// Companded, the default, is arithmetic alone, so that every compiler and device computes the same bits:
//
//     signed      x = sign(c) (c / 127)^2 absmax     c = -127 ... 127, in two's complement
//     unsigned    x = (c / 255)^4 absmax             c = 0 ... 255
//
// Small values keep a relative precision: the steps of sqrt|x|, and of sqrt(sqrt x), are even. Zero is code 0 and comes
// back as 0; the largest magnitude comes back as itself, so what is quantised, read and quantised again has the same codes
// and the same absmax. Only 0 is given the unsigned code 0: a second moment that vanished would make its step explode.
//
// Dynamic is the map of bitsandbytes: a table of 256 values, of which the nearest is taken (and again, only 0 becomes 0).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace fastft {

constexpr int kQuantBlock = 256;
// A block whose largest magnitude is smaller is stored as zeros: its smallest codes would be denormal numbers.
constexpr float kSmallestAbsmax = 8.077935669463161e-28f;  // 2^-90
// Second moments beyond are not stored: the reciprocal of their absmax would be a denormal number.
constexpr float kLargestMoment = 8.507059173023462e37f;  // 2^126

// Choices are made on bits: from `?:` compilers make two paths, and compute square roots and divisions on both.
FASTFT_INLINE float magnitude_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

FASTFT_INLINE float choose(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

FASTFT_INLINE float stored_absmax(float largest) { return largest < kSmallestAbsmax ? 0.0f : largest; }

FASTFT_INLINE float reciprocal_or_zero(float x) { return x > 0.0f ? 1.0f / x : 0.0f; }

// Codes are bytes. Loops that widen many at once first, as `Signed` says, go on with `read_widened`.
struct Companded {
  using Signed = int8_t;

  FASTFT_INLINE float read_signed(uint8_t code, float absmax) const {
    return read_widened(static_cast<Signed>(code), absmax);
  }

  FASTFT_INLINE float read_widened(int code, float absmax) const {
    const float f = static_cast<float>(code) * (1.0f / 127.0f);
    return f * magnitude_of(f) * absmax;
  }

  FASTFT_INLINE float read_unsigned(int code, float absmax) const {
    const float f = static_cast<float>(code) * (1.0f / 255.0f);
    return f * f * (f * f) * absmax;
  }

  // scale: reciprocal_or_zero(absmax)
  FASTFT_INLINE int write_signed(float x, float scale) const {
    const int code = static_cast<int>(std::sqrt(magnitude_of(x) * scale) * 127.0f + 0.5f);
    const int negative = static_cast<int>(bits_of(x) >> 31);
    return ((code ^ -negative) + negative) & 255;
  }

  // root: the square root of the value, which the update knows; scale: reciprocal_or_zero(sqrt(absmax))
  FASTFT_INLINE int write_root(float root, float scale) const {
    const float ratio = root * scale;
    const int code = static_cast<int>(std::sqrt(ratio) * 255.0f + 0.5f);
    const uint32_t vanished = (static_cast<uint32_t>(code) - 1u) & ~(bits_of(ratio) - 1u);
    return code + static_cast<int>(vanished >> 31);
  }
};

struct Dynamic {
  using Signed = uint8_t;

  const float* signed_map;  // 256 values, ascending, from about -1 to 1
  const float* unsigned_map;  // 256 values, ascending, from 0 to 1

  FASTFT_INLINE float read_signed(uint8_t code, float absmax) const { return read_widened(code, absmax); }

  FASTFT_INLINE float read_widened(int code, float absmax) const { return signed_map[code] * absmax; }

  FASTFT_INLINE float read_unsigned(int code, float absmax) const { return unsigned_map[code] * absmax; }

  FASTFT_INLINE int write_signed(float x, float scale) const { return nearest(signed_map, x * scale); }

  FASTFT_INLINE int write_root(float root, float scale) const {
    const float ratio = root * scale;
    const int code = nearest(unsigned_map, ratio * ratio);
    return code == 0 && ratio > 0.0f ? 1 : code;
  }

  // Index of the value nearest to x; of two as near, the smaller. Eight halvings without a branch.
  static FASTFT_INLINE int nearest(const float* map, float x) {
    int low = 0;
    for (int half = 128; half > 0; half /= 2) low += map[low + half] <= x ? half : 0;
    const int high = low < 255 ? low + 1 : 255;
    return x - map[low] <= map[high] - x ? low : high;
  }
};

}  // namespace fastft
