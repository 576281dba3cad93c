// SwiGLU and GEGLU on the CPU. The equations are in kernels/fastft_kernels/reference/gated_activation.py.
#include "cpu/gated_activation.h"

#include "common/columns.h"
#include "common/parallel.h"

namespace fastft {
namespace {

// Elements of a row at a time, widened, computed and narrowed in loops of their own: see gelu.cpp.
constexpr int64_t kBlock = 64;

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
    int64_t j = 0;
    for (; j + kBlock <= width; j += kBlock) block(g + j, u + j, out + j, kBlock);
    block(g + j, u + j, out + j, width - j);
  }

  FASTFT_INLINE void block(const T* g, const T* u, T* out, int64_t n) const {
    float h[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = widen(g[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = Act::value(h[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] *= widen(u[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(h[j], out[j]);
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
    int64_t j = 0;
    for (; j + kBlock <= width; j += kBlock) block(d + j, g + j, u + j, to_gate + j, to_up + j, kBlock);
    block(d + j, g + j, u + j, to_gate + j, to_up + j, width - j);
  }

  FASTFT_INLINE void block(const T* d, const T* g, const T* u, T* to_gate, T* to_up, int64_t n) const {
    float value[kBlock], slope[kBlock], back[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) back[j] = widen(d[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) value[j] = widen(g[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) Act::both(value[j], value[j], slope[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) slope[j] *= back[j] * widen(u[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(slope[j], to_gate[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(back[j] * value[j], to_up[j]);
  }
};

}  // namespace

void gated_activation_forward(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                              int64_t rows, int64_t cols, Activation activation, DType dtype, int threads) {
  const int64_t elements = rows * cols;
  if (gate_stride == cols && up_stride == cols) cols = elements;  // one long row
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [&](auto act) {
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
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [&](auto act) {
      parallel_for(elements, elements, threads,
                   Backward<T, typename decltype(act)::type>{
                       static_cast<const T*>(dy), dy_stride, static_cast<const T*>(gate), gate_stride,
                       static_cast<const T*>(up), up_stride, static_cast<T*>(dgate), static_cast<T*>(dup), cols});
    });
  });
}

}  // namespace fastft
