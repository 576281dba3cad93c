// SwiGLU and GEGLU on the CPU. The equations are in kernels/fastft_kernels/reference/gated_activation.py.
#include "cpu/gated_activation.h"

#include <algorithm>
#include <stdexcept>

#include "common/elementary.h"
#include "common/parallel.h"

namespace fastft {
namespace {

struct Silu {
  static FASTFT_INLINE float value(float g) { return g * sigmoid_of(g); }

  static FASTFT_INLINE void both(float g, float& value, float& slope) {
    const float s = sigmoid_of(g);
    value = g * s;
    slope = s * (1.0f + g * (1.0f - s));
  }
};

struct Gelu {
  static FASTFT_INLINE float cdf(float g) { return 0.5f + 0.5f * erf_of(g * 0.70710678f); }

  static FASTFT_INLINE float value(float g) { return g * cdf(g); }

  static FASTFT_INLINE void both(float g, float& value, float& slope) {
    const float c = cdf(g);
    value = g * c;
    slope = c + g * (0.39894228f * exp_of(-0.5f * g * g));
  }
};

// (1 + tanh(u)) / 2 is the logistic function s of 2 u. The derivative multiplies 1 - s by up to g^3, so both s and 1 - s
// come from exp(-|2 u|), without a difference.
struct GeluTanh {
  static constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)

  static FASTFT_INLINE float twice_u(float g) { return kScale * (g + 0.044715f * g * g * g); }

  static FASTFT_INLINE float value(float g) { return g * sigmoid_of(twice_u(g)); }

  static FASTFT_INLINE void both(float g, float& value, float& slope) {
    const float u = twice_u(g);
    const float e = exp_of(u < 0.0f ? u : -u);
    const float large = 1.0f / (1.0f + e);
    const float small = e * large;
    const float s = u < 0.0f ? small : large;
    value = g * s;
    slope = s + g * (large * small) * (kScale * (1.0f + 0.134145f * g * g));
  }
};

// Calls body.piece(row, first column, width) for the pieces of rows that make up the elements [begin, end).
template <class Body>
FASTFT_INLINE void over_rows(int64_t begin, int64_t end, int64_t cols, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / cols, first = begin % cols;
    const int64_t width = std::min(cols - first, end - begin);
    body.piece(row, first, width);
    begin += width;
  }
}

template <class T, class Act>
struct Forward {
  const T* gate;
  int64_t gate_stride;
  const T* up;
  int64_t up_stride;
  T* y;
  int64_t cols;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const { over_rows(begin, end, cols, *this); }

  FASTFT_INLINE void piece(int64_t row, int64_t first, int64_t width) const {
    const T* g = gate + row * gate_stride + first;
    const T* u = up + row * up_stride + first;
    T* out = y + row * cols + first;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) narrow(Act::value(widen(g[j])) * widen(u[j]), out[j]);
  }
};

template <class T, class Act>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* gate;
  int64_t gate_stride;
  const T* up;
  int64_t up_stride;
  T* dgate;
  T* dup;
  int64_t cols;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const { over_rows(begin, end, cols, *this); }

  FASTFT_INLINE void piece(int64_t row, int64_t first, int64_t width) const {
    const T* d = dy + row * dy_stride + first;
    const T* g = gate + row * gate_stride + first;
    const T* u = up + row * up_stride + first;
    T* to_gate = dgate + row * cols + first;
    T* to_up = dup + row * cols + first;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      float value, slope;
      Act::both(widen(g[j]), value, slope);
      const float back = widen(d[j]);
      narrow(back * widen(u[j]) * slope, to_gate[j]);
      narrow(back * value, to_up[j]);
    }
  }
};

template <class F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::silu:
      return f(Type<Silu>{});
    case Activation::gelu:
      return f(Type<Gelu>{});
    case Activation::gelu_tanh:
      return f(Type<GeluTanh>{});
  }
  throw std::invalid_argument("unknown activation code");
}

}  // namespace

void gated_activation_forward(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                              int64_t rows, int64_t cols, Activation activation, DType dtype, int threads) {
  const int64_t elements = rows * cols;
  if (gate_stride == cols && up_stride == cols) cols = elements;  // one long row
  with_type(dtype, [&](auto type) {
    with_activation(activation, [&](auto act) {
      using T = typename decltype(type)::type;
      parallel_for(elements, elements, threads,
                   Forward<T, typename decltype(act)::type>{static_cast<const T*>(gate), gate_stride,
                                                            static_cast<const T*>(up), up_stride, static_cast<T*>(y),
                                                            cols});
    });
  });
}

void gated_activation_backward(const void* dy, int64_t dy_stride, const void* gate, int64_t gate_stride,
                               const void* up, int64_t up_stride, void* dgate, void* dup, int64_t rows, int64_t cols,
                               Activation activation, DType dtype, int threads) {
  const int64_t elements = rows * cols;
  if (dy_stride == cols && gate_stride == cols && up_stride == cols) cols = elements;
  with_type(dtype, [&](auto type) {
    with_activation(activation, [&](auto act) {
      using T = typename decltype(type)::type;
      parallel_for(elements, elements, threads,
                   Backward<T, typename decltype(act)::type>{
                       static_cast<const T*>(dy), dy_stride, static_cast<const T*>(gate), gate_stride,
                       static_cast<const T*>(up), up_stride, static_cast<T*>(dgate), static_cast<T*>(dup), cols});
    });
  });
}

}  // namespace fastft
