// Weights in 4 bits, NF4: the arithmetic of quantising and reading one element, which all instruction sets, and the GPU,
// share. The format is bitsandbytes'; equation and layout: kernels/fastft_kernels/reference/nf4.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/quantize8.h"

namespace fastft {

// A block whose largest magnitude is smaller is divided by this: its reciprocal is a finite number.
constexpr float kSmallestDivisor = 1e-38f;

// Value of code 0 ... 15: quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al., 2023).
FASTFT_INLINE float nf4_value(int code) {
  constexpr float values[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
  return values[code];
}

// The code nearest to x, of two as near the smaller: how many midpoints between neighbouring values, rounded to float, lie
// below x.
FASTFT_INLINE int nf4_code(float x) {
  return (x > -0.8480963706970215f) + (x > -0.6106328964233398f) + (x > -0.4599952697753906f) +
         (x > -0.33967941999435425f) + (x > -0.23460739850997925f) + (x > -0.13791173696517944f) +
         (x > -0.045525018125772476f) + (x > 0.03979014977812767f) + (x > 0.120255246758461f) +
         (x > 0.2035212516784668f) + (x > 0.2920137643814087f) + (x > 0.3893125355243683f) +
         (x > 0.5016634464263916f) + (x > 0.6427869200706482f) + (x > 0.8614784479141235f);
}

FASTFT_INLINE float nf4_scale(float absmax) {
  return 1.0f / (absmax < kSmallestDivisor ? kSmallestDivisor : absmax);
}

// Where the absmax of each block comes from: floats, or with double quantisation codes of 8 bits, of which 256 share a
// nested absmax.
struct NF4Scales {
  const void* absmax;   // float, or uint8_t where there is a map
  const float* map;     // 256 values, or null
  const float* nested;  // a float for each 256 codes
  float offset;

  FASTFT_INLINE float at(int64_t block) const {
    if (map == nullptr) return static_cast<const float*>(absmax)[block];
    return map[static_cast<const uint8_t*>(absmax)[block]] * nested[block / kQuantBlock] + offset;
  }
};

}  // namespace fastft
