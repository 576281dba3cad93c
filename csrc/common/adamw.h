// One element of AdamW and of Lion, in float: the arithmetic that all instruction sets, and the GPU, share.
#pragma once

#include <cmath>

#include "common/quantize8.h"

namespace fastft {

// What a step has in common for all elements, computed in double and rounded once (`scalars` in reference/adamw.py).
struct AdamWStep {
  float grad_scale;   // multiplies the gradient: 1 / (loss scale and clipping)
  float decay;        // 1 - lr weight_decay
  float beta1;
  float rest1;        // 1 - beta1
  float beta2;
  float rest2;        // 1 - beta2
  float rate;         // lr / (1 - beta1^t); Lion: lr
  float root_scale;   // 1 / sqrt(1 - beta2^t)
  float eps;
};

// m, v: the moments before and after. root: sqrt(v). Returns the weight after.
FASTFT_INLINE float adamw_element(float w, float gradient, float& m, float& v, float& root, const AdamWStep& s) {
  const float g = gradient * s.grad_scale;
  m = s.beta1 * m + s.rest1 * g;
  v = s.beta2 * v + s.rest2 * (g * g);
  root = std::sqrt(v);
  const float denominator = root * s.root_scale + s.eps;
  return s.decay * w - s.rate * (m / denominator);
}

// The same for moments that share their scale with a block, which one NaN would spoil: an element whose second moment
// would not be a finite number stays as it is, weight and moments. With eps = 0 an element without history stays too.
FASTFT_INLINE float guarded_adamw_element(float w, float gradient, float& m, float& v, float& root,
                                          const AdamWStep& s) {
  const float g = gradient * s.grad_scale;
  const float next_v = s.beta2 * v + s.rest2 * (g * g);
  const bool good = next_v < kLargestMoment;  // false for NaN
  const float next_m = s.beta1 * m + s.rest1 * g;
  m = choose(good, next_m, m);
  v = choose(good, next_v, v);
  root = std::sqrt(v);
  const float denominator = root * s.root_scale + s.eps;
  const float step = choose(denominator > 0.0f, m / denominator, 0.0f);
  return choose(good, s.decay * w - s.rate * step, w);
}

// Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675): the sign of an interpolation; one moment.
FASTFT_INLINE float guarded_lion_element(float w, float gradient, float& m, const AdamWStep& s) {
  const float g = gradient * s.grad_scale;
  const float direction = s.beta1 * m + s.rest1 * g;
  const float next_m = s.beta2 * m + s.rest2 * g;
  const bool good = magnitude_of(next_m) < kLargestMoment;  // false for NaN
  const float sign = static_cast<float>(direction > 0.0f) - static_cast<float>(direction < 0.0f);
  m = choose(good, next_m, m);
  return choose(good, s.decay * w - s.rate * sign, w);
}

}  // namespace fastft
