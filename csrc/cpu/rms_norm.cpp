// RMSNorm on the CPU. The equations are in kernels/fastft_kernels/reference/rms_norm.py.
//
// A row is read from memory once: its second pass finds it in the first or second level cache.
#include "cpu/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/columns.h"
#include "common/lanes.h"
#include "common/parallel.h"

namespace fastft {
namespace {

// RoundFirst: the normalised row is rounded to T before the weight multiplies it (Llama), else only after (Gemma).
template <class T, bool RoundFirst>
struct Forward {
  const T* x;
  int64_t x_stride;
  const T* residual;
  int64_t residual_stride;
  const float* scale;
  T* y;
  T* h;
  float* rstd;
  int64_t cols;
  float eps;
  bool finite_scale;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * x_stride;
      if (residual != nullptr) in = add(in, residual + row * residual_stride, h + row * cols);
      const float sum = lane_sum(cols, [in](int64_t j) { return widen(in[j]) * widen(in[j]); });
      rstd[row] = 1.0f / std::sqrt(sum / static_cast<float>(cols) + eps);
      const float r = rstd[row], infinity = std::numeric_limits<float>::infinity();
      if (finite_scale && sum < infinity && r < infinity)
        normalise<false>(in, r, y + row * cols);
      else
        normalise<true>(in, r, y + row * cols);
    }
  }

  FASTFT_INLINE const T* add(const T* a, const T* b, T* sum) const {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) narrow(widen(a[j]) + widen(b[j]), sum[j]);
    return sum;
  }

  // WithNaN: NaN may turn up.
  template <bool WithNaN>
  FASTFT_INLINE void normalise(const T* in, float r, T* out) const {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const float normalised = widen(in[j]) * r;
      if (WithNaN)
        narrow((RoundFirst ? rounded<T>(normalised) : normalised) * scale[j], out[j]);
      else
        narrow_number((RoundFirst ? rounded_number<T>(normalised) : normalised) * scale[j], out[j]);
    }
  }
};

// dx, and per chunk of rows the float sum of dy * h * rstd, from which dweight is added up.
template <class T>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* dh;
  int64_t dh_stride;
  const T* h;
  int64_t h_stride;
  const float* scale;
  const float* rstd;
  T* dx;
  float* partial;
  int64_t cols;
  Chunks chunks;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t row = chunks.first(chunk); row < chunks.last(chunk); ++row) {
        const T* g = dy + row * dy_stride;
        const T* in = h + row * h_stride;
        const float* s = scale;
        const float dot = lane_sum(cols, [=](int64_t j) { return widen(g[j]) * s[j] * widen(in[j]); });
        input_gradient(g, in, row, dot);
        if (partial != nullptr) add_weight_gradient(g, in, rstd[row], partial + chunk * cols);
      }
    }
  }

  FASTFT_INLINE void input_gradient(const T* g, const T* in, int64_t row, float dot) const {
    const float r = rstd[row];
    const float back = dot / static_cast<float>(cols) * r * r;
    T* out = dx + row * cols;
    if (dh == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow(r * (widen(g[j]) * scale[j] - widen(in[j]) * back), out[j]);
    } else {
      const T* through = dh + row * dh_stride;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j)
        narrow(r * (widen(g[j]) * scale[j] - widen(in[j]) * back) + widen(through[j]), out[j]);
    }
  }

  FASTFT_INLINE void add_weight_gradient(const T* g, const T* in, float r, float* sum) const {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sum[j] += widen(g[j]) * (widen(in[j]) * r);
  }
};

}  // namespace

void rms_norm_forward(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                      const void* weight, void* y, void* h, float* rstd, int64_t rows, int64_t cols, float eps,
                      float offset, DType dtype, DType weight_dtype, int threads) {
  const std::vector<float> scale = widened(weight, weight_dtype, cols, offset);
  const bool finite_scale = std::all_of(scale.begin(), scale.end(), [](float value) { return std::isfinite(value); });
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto body) { parallel_for(rows, rows * cols, threads, body); };
    const T* in = static_cast<const T*>(x);
    const T* add = static_cast<const T*>(residual);
    T* out = static_cast<T*>(y);
    T* sum = static_cast<T*>(h);
    if (offset == 0.0f)
      run(Forward<T, true>{in, x_stride, add, residual_stride, scale.data(), out, sum, rstd, cols, eps, finite_scale});
    else
      run(Forward<T, false>{in, x_stride, add, residual_stride, scale.data(), out, sum, rstd, cols, eps, finite_scale});
  });
}

void rms_norm_backward(const void* dy, int64_t dy_stride, const void* dh, int64_t dh_stride, const void* h,
                       int64_t h_stride, const void* weight, const float* rstd, void* dx, void* dweight, int64_t rows,
                       int64_t cols, float offset, DType dtype, DType weight_dtype, int threads) {
  const Chunks chunks(rows);
  const std::vector<float> scale = widened(weight, weight_dtype, cols, offset);
  std::vector<float> partial(dweight != nullptr ? chunks.count * cols : 0);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(chunks.count, rows * cols, threads,
                 Backward<T>{static_cast<const T*>(dy), dy_stride, static_cast<const T*>(dh), dh_stride,
                             static_cast<const T*>(h), h_stride, scale.data(), rstd, static_cast<T*>(dx),
                             dweight != nullptr ? partial.data() : nullptr, cols, chunks});
  });
  sum_chunks(partial, dweight, weight_dtype, chunks.count, cols, threads);
}

}  // namespace fastft
