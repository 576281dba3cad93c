// Sums along a row whose rounding does not depend on the vector width of the machine.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastft {

// Wide enough to hide the latency of an add: four AVX2 or two AVX-512 registers.
constexpr int kLanes = 32;

// term(0) + ... + term(n - 1): lane k adds the terms k, k + kLanes, ...; the lanes are then added pairwise.
template <class Term>
FASTFT_INLINE float lane_sum(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(j + k);
  }
  for (int k = 0; j + k < n; ++k) lanes[k] += term(j + k);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

// Two such sums in one pass: term(j, a, b) sets a and b to the j-th term of each.
template <class Term>
FASTFT_INLINE void lane_sums(int64_t n, const Term& term, float& first, float& second) {
  float lanes[kLanes] = {}, others[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) {
      float a, b;
      term(j + k, a, b);
      lanes[k] += a;
      others[k] += b;
    }
  }
  for (int k = 0; j + k < n; ++k) {
    float a, b;
    term(j + k, a, b);
    lanes[k] += a;
    others[k] += b;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half], others[k] += others[k + half];
  first = lanes[0];
  second = others[0];
}

}  // namespace fastft
