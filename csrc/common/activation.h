// SiLU and GELU in float, with their derivatives.
//
// Each is x s(x) with s(-x) = 1 - s(x), where s is the logistic function, the normal distribution function, or the logistic
// function of a polynomial. All of it comes from the tail at a = |x|, q = s(-a), and the slope there, dq = q - a s'(a):
//
//     x s(x) = max(x, 0) - a q          (x s(x))' = 1 - dq for x > 0, else dq
//
// So nothing small is the difference of large numbers, and far out on the left the result keeps its relative accuracy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/dtype.h"
#include "common/elementary.h"
#include "common/isa.h"

namespace fastft {

enum class Activation : int { silu, gelu, gelu_tanh };  // the order of reference/gated_activation.py

struct SiluTail {
  static FASTFT_INLINE void tail(float a, float& q, float& dq) {
    const float e = halved(1.44269504f * a);  // exp(-a)
    const float large = 1.0f / (1.0f + e);
    q = e * large;
    dq = q - a * (large * q);
  }
};

struct GeluTail {
  static FASTFT_INLINE void tail(float a, float& q, float& dq) {
    const float e = halved(0.72134752f * a * a);  // exp(-a^2 / 2)
    // q / e falls slowly from 1 / 2; this quotient of polynomials is within 2e-9 of it, relatively, up to 9.
    float n = 3.55788786e-3f;
    n = n * a + 3.67825584e-2f;
    n = n * a + 1.71647119e-1f;
    n = n * a + 4.22350468e-1f;
    n = n * a + 0.5f;
    float d = 8.91797767e-3f;
    d = d * a + 9.22139931e-2f;
    d = d * a + 4.38910656e-1f;
    d = d * a + 1.15388614f;
    d = d * a + 1.64258564f;
    d = d * a + 1.0f;
    const float ratio = n / d;
    q = e * ratio;
    dq = e * (ratio - 0.39894228f * a);
  }
};

// (1 + tanh(u)) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanhTail {
  static FASTFT_INLINE void tail(float a, float& q, float& dq) {
    constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
    const float square = a * a;
    const float e = halved(1.44269504f * kScale * (a + 0.044715f * square * a));  // exp(-2 u)
    const float large = 1.0f / (1.0f + e);
    q = e * large;
    dq = q - a * (large * q) * (kScale * (1.0f + 0.134145f * square));
  }
};

template <class Tail>
struct Activated {
  static FASTFT_INLINE float value(float x) {
    float y, dy;
    both(x, y, dy);
    return y;
  }

  static FASTFT_INLINE float slope(float x) {
    float y, dy;
    both(x, y, dy);
    return dy;
  }

  static FASTFT_INLINE void both(float x, float& y, float& dy) {
    // From 100 on every tail is 0; what is larger is taken as 100, so that no power of it is infinite. So is NaN.
    const uint32_t bits = bits_of(x) & 0x7fffffffu, most = bits_of(100.0f);
    const float a = float_of(bits < most ? bits : most);
    float q, dq;
    Tail::tail(a, q, dq);
    y = (x < 0.0f ? 0.0f : x) - a * q;
    dy = x < 0.0f ? dq : 1.0f - dq;
    dy = x == x ? dy : x;
  }
};

// c0 + c1 s + c2 s^2 ...
FASTFT_INLINE float polynomial(float, float c) { return c; }

template <class... More>
FASTFT_INLINE float polynomial(float s, float c, More... more) {
  return polynomial(s, more...) * s + c;
}

// For numbers of 16 bits, GELU without the exponential, at half the cost: s(x) and (x s(x))' are both 1/2 plus an odd
// function, here x N(x^2) / D(x^2), fitted to 4e-7. Where this error is large beside the tail, x being below -4, what x lost
// when it was rounded to 16 bits changes the result more. From `kEnd`, squared, on, the odd function is +-1/2.
struct GeluQuotient {
  static constexpr float kEnd = 27.5625f, kSlopeEnd = 33.0625f;

  static FASTFT_INLINE float odd(float s) {
    return polynomial(s, 774549.375f, 98586.4297f, 10882.3184f, 635.501465f, 11.7305307f) /
           polynomial(s, 1941509.38f, 570691.688f, 73878.9062f, 5397.52588f, 227.945236f, 1.0f);
  }

  static FASTFT_INLINE float odd_slope(float s) {
    return polynomial(s, 89132.2188f, -3462.49561f, 1589.66138f, 2.14890432f, 4.01647234f, 0.0215497334f) /
           polynomial(s, 111710.555f, 32898.1797f, 4577.93457f, 393.55896f, 21.4525528f, 1.0f);
  }
};

struct GeluTanhQuotient {
  static constexpr float kEnd = 22.5625f, kSlopeEnd = 27.5625f;

  static FASTFT_INLINE float odd(float s) {
    return polynomial(s, 904099.688f, 77526.6562f, 7994.45801f, 324.767883f, 9.86794186f) /
           polynomial(s, 2266242.5f, 573903.25f, 58218.5039f, 2945.54565f, 150.757858f, 1.0f);
  }

  static FASTFT_INLINE float odd_slope(float s) {
    return polynomial(s, 102933.016f, -5065.15918f, 1696.73962f, -20.3701668f, 4.12571859f, 0.0197959598f) /
           polynomial(s, 129007.125f, 36869.1914f, 4575.41699f, 291.755371f, 17.9183369f, 1.0f);
  }
};

template <class Quotient>
struct Approximated {
  static FASTFT_INLINE float value(float x) {
    const float s = x * x;
    const float near = x * (0.5f + x * Quotient::odd(s)), far = x < 0.0f ? 0.0f : x;
    return s >= Quotient::kEnd ? far : near;  // NaN is near, and stays NaN
  }

  static FASTFT_INLINE float slope(float x) {
    const float s = x * x;
    const float near = 0.5f + x * Quotient::odd_slope(s), far = x < 0.0f ? 0.0f : 1.0f;
    return s >= Quotient::kSlopeEnd ? far : near;
  }

  static FASTFT_INLINE void both(float x, float& y, float& dy) {
    y = value(x);
    dy = slope(x);
  }
};

// Calls f with Type<A>, A being the functions above that compute `activation` for elements of type T.
template <class T, class F>
void with_activation(Activation activation, F&& f) {
  constexpr bool wide = sizeof(T) == sizeof(float);
  switch (activation) {
    case Activation::silu:
      return f(Type<Activated<SiluTail>>{});
    case Activation::gelu:
      return f(Type<std::conditional_t<wide, Activated<GeluTail>, Approximated<GeluQuotient>>>{});
    case Activation::gelu_tanh:
      return f(Type<std::conditional_t<wide, Activated<GeluTanhTail>, Approximated<GeluTanhQuotient>>>{});
  }
  throw std::invalid_argument("unknown activation code");
}

}  // namespace fastft
