// Exponentials and tanh in float, to about two units in the last place.
//
// Without branches and without the C library, whose functions do not vectorise and differ between machines: the same bits
// on every instruction set. NaN gives NaN.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastft {

constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits

FASTFT_INLINE float exp_of(float x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = clamped * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n as two factors: together they reach infinity and the subnormals.
  const uint32_t power = bits_of(shifted) - bits_of(kShift) + 254u;
  const uint32_t half = power >> 1;
  return p * float_of(half << 23) * float_of((power - half) << 23);
}

// exp(x) for x <= 0, cheaper; below -87 it stays at 1e-38, which is nothing beside the largest of a softmax, 1.
FASTFT_INLINE float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.3981999507e-3f + r * 1.9875691500e-4f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) - bits_of(kShift) + 127u) << 23);
}

// 2^x for x <= 0, cheaper still; below -126 it stays at 1e-38.
FASTFT_INLINE float exp2_of_negative(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + (kShift + 127.0f);
  const float r = clamped - (shifted - (kShift + 127.0f));
  float p = 1.33988744e-3f + r * 1.53533619e-4f;
  p = p * r + 9.61843736e-3f;
  p = p * r + 5.55033247e-2f;
  p = p * r + 2.40226479e-1f;
  p = p * r + 6.93147203e-1f;
  p = p * r + 1.0f;
  return p * float_of(bits_of(shifted) << 23);
}

// 2^-t for 0 <= t < 2^22, and 0 where that is no normal number.
FASTFT_INLINE float halved(float t) {
  const float shifted = kShift - t;
  const float r = (kShift - shifted) - t;
  float p = 1.33988744e-3f + r * 1.53533619e-4f;
  p = p * r + 9.61843736e-3f;
  p = p * r + 5.55033247e-2f;
  p = p * r + 2.40226479e-1f;
  p = p * r + 6.93147203e-1f;
  p = p * r + 1.0f;
  const int32_t power = static_cast<int32_t>(bits_of(shifted) - bits_of(kShift)) + 127;
  return p * float_of(static_cast<uint32_t>(power < 0 ? 0 : power) << 23);
}

FASTFT_INLINE float tanh_of(float x) {
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
  const float large = 1.0f - 2.0f / (exp_of(2.0f * magnitude) + 1.0f);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float small = p * s * magnitude + magnitude;
  return float_of(bits_of(magnitude < 0.625f ? small : large) | (bits_of(x) & 0x80000000u));
}

}  // namespace fastft
