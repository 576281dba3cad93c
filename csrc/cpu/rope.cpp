// Rotary position embedding on the CPU. The equations are in kernels/fastft_kernels/reference/rope.py.
//
// Token by token: its cosines and sines are widened once, for all heads of q and k.
#include "cpu/rope.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace fastft {
namespace {

constexpr int64_t kPairs = 64;  // of a head at a time: their angles stay in the first level cache

// What the pairs of a head are multiplied with: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2.
struct Angles {
  float cos1[kPairs], cos2[kPairs], sin1[kPairs], sin2[kPairs];
};

template <class T, class A>
struct Rotate {
  RopeShape shape;
  const T* q;
  const T* k;
  const A* cos;
  const A* sin;
  T* q_out;
  T* k_out;
  bool inverse;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / shape.tokens, s = i % shape.tokens;
      const A* c = cos + b * shape.cos[0] + s * shape.cos[1];
      const A* t = sin + b * shape.sin[0] + s * shape.sin[1];
      for (int64_t first = 0; first < shape.half; first += kPairs) {
        const int64_t width = std::min(kPairs, shape.half - first);
        Angles angles;
        gather(c + first, t + first, width, angles);
        heads(q + b * shape.q[0] + s * shape.q[1], shape.q[2], q_out + b * shape.q_out[0] + s * shape.q_out[1],
              shape.q_out[2], shape.heads_q, first, width, angles);
        heads(k + b * shape.k[0] + s * shape.k[1], shape.k[2], k_out + b * shape.k_out[0] + s * shape.k_out[1],
              shape.k_out[2], shape.heads_k, first, width, angles);
      }
    }
  }

  FASTFT_INLINE void gather(const A* c, const A* t, int64_t width, Angles& angles) const {
    widen_row(c, width, 1.0f, angles.cos1);
    widen_row(c + shape.half, width, 1.0f, angles.cos2);
    widen_row(t, width, 1.0f, inverse ? angles.sin2 : angles.sin1);
    widen_row(t + shape.half, width, 1.0f, inverse ? angles.sin1 : angles.sin2);
    if (!inverse) return;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      angles.sin1[j] = -angles.sin1[j];
      angles.sin2[j] = -angles.sin2[j];
    }
  }

  FASTFT_INLINE void heads(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t count, int64_t first,
                           int64_t width, const Angles& angles) const {
    const int64_t turned = 2 * shape.half;
    for (int64_t head = 0; head < count; ++head, x += x_stride, y += y_stride) {
      // A constant number of pairs, that of the usual head sizes, needs no loop over a rest.
      if (width == 64)
        turn<64>(x + first, y + first, 64, angles);
      else if (width == 32)
        turn<32>(x + first, y + first, 32, angles);
      else if (width == 16)
        turn<16>(x + first, y + first, 16, angles);
      else
        turn<0>(x + first, y + first, width, angles);
      if (first == 0 && turned < shape.head_size)
        std::memcpy(y + turned, x + turned, sizeof(T) * (shape.head_size - turned));
    }
  }

  template <int Width>
  FASTFT_INLINE void turn(const T* x, T* y, int64_t width, const Angles& angles) const {
    const int64_t n = Width ? Width : width;
    const T* x2 = x + shape.half;
    T* y2 = y + shape.half;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float a = widen(x[j]), b = widen(x2[j]);
      narrow(a * angles.cos1[j] - b * angles.sin1[j], y[j]);
      narrow(b * angles.cos2[j] + a * angles.sin2[j], y2[j]);
    }
  }
};

}  // namespace

void rope(const RopeShape* shape, const void* q, const void* k, const void* cos, const void* sin, void* q_out,
          void* k_out, bool inverse, DType dtype, DType angle_dtype, int threads) {
  const int64_t rows = shape->batch * shape->tokens;
  const int64_t elements = rows * (shape->heads_q + shape->heads_k) * shape->head_size;
  with_type(dtype, [&](auto type) {
    with_type(angle_dtype, [&](auto angle_type) {
      using T = typename decltype(type)::type;
      using A = typename decltype(angle_type)::type;
      parallel_for(rows, elements, threads,
                   Rotate<T, A>{*shape, static_cast<const T*>(q), static_cast<const T*>(k),
                                static_cast<const A*>(cos), static_cast<const A*>(sin), static_cast<T*>(q_out),
                                static_cast<T*>(k_out), inverse});
    });
  });
}

}  // namespace fastft
