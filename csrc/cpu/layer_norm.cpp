// LayerNorm on the CPU, with dropout and a residual in front. The equations are in
// kernels/fastft_kernels/reference/layer_norm.py.
//
// A row is read from memory once: its further passes find it in the first or second level cache, where the draws of its
// dropout are too.
#include "cpu/layer_norm.h"

#include <cmath>
#include <vector>

#include "common/columns.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/philox.h"

namespace fastft {
namespace {

// The draws of a row of x. Rows of any length: the first element of one may stand anywhere within a counter's eight.
struct Mask {
  uint32_t threshold;
  float scale;
  uint64_t seed;

  std::vector<uint32_t> room(int64_t cols) const {
    return std::vector<uint32_t>(threshold > 0 ? 4 * (cols / kDrawsPerCounter + 2) : 0);
  }

  // Fills `words` for the row and returns the index of its first element's draw among them.
  FASTFT_INLINE int64_t draw(int64_t row, int64_t cols, uint32_t* words) const {
    const int64_t first = row * cols, skipped = first % kDrawsPerCounter;
    const int64_t counters = (skipped + cols + kDrawsPerCounter - 1) / kDrawsPerCounter;
    draw_words(seed, static_cast<uint64_t>(first / kDrawsPerCounter), counters, words);
    return skipped;
  }

  FASTFT_INLINE float operator()(const uint32_t* words, int64_t j, float value) const {
    const float kept = value * scale;
    return draw_of(words, j) >= threshold ? kept : 0.0f;
  }
};

template <class T>
struct Forward {
  const T* x;
  int64_t x_stride;
  const T* residual;
  int64_t residual_stride;
  const float* weight;
  const float* bias;
  T* y;
  T* h;
  float* mean;
  float* rstd;
  int64_t cols;
  float eps;
  Mask mask;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    std::vector<uint32_t> words = mask.room(cols);
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * x_stride;
      if (h != nullptr) in = add(in, row, words.data());
      const float count = static_cast<float>(cols);
      const float m = lane_sum(cols, [in](int64_t j) { return widen(in[j]); }) / count;
      const auto square = [in, m](int64_t j) { return (widen(in[j]) - m) * (widen(in[j]) - m); };
      const float r = 1.0f / std::sqrt(lane_sum(cols, square) / count + eps);
      mean[row] = m;
      rstd[row] = r;
      T* out = y + row * cols;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow((widen(in[j]) - m) * r * weight[j] + bias[j], out[j]);
    }
  }

  FASTFT_INLINE const T* add(const T* a, int64_t row, uint32_t* words) const {
    const T* b = residual + row * residual_stride;
    T* sum = h + row * cols;
    const Mask drop = mask;
    if (drop.threshold == 0) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow(widen(a[j]) + widen(b[j]), sum[j]);
      return sum;
    }
    const int64_t first = drop.draw(row, cols, words);
    if (residual == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow(drop(words, first + j, widen(a[j])), sum[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow(drop(words, first + j, widen(a[j])) + widen(b[j]), sum[j]);
    }
    return sum;
  }
};

// dx and dresidual, and per chunk of rows the float sums of dy * xhat and of dy, from which dweight and dbias come.
template <class T>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* dh;
  int64_t dh_stride;
  const T* h;
  int64_t h_stride;
  const float* weight;
  const float* mean;
  const float* rstd;
  T* dx;
  T* dresidual;
  float* weight_sums;
  float* bias_sums;
  int64_t cols;
  Chunks chunks;
  Mask mask;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    std::vector<uint32_t> words = mask.room(cols);
    std::vector<float> row_gradient(cols);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t row = chunks.first(chunk); row < chunks.last(chunk); ++row) {
        gradient_of_h(row, row_gradient.data());
        store(row, row_gradient.data(), words.data());
        add_sums(row, chunk);
      }
    }
  }

  FASTFT_INLINE void gradient_of_h(int64_t row, float* out) const {
    const T* g = dy + row * dy_stride;
    const T* in = h + row * h_stride;
    const float* w = weight;
    const float m = mean[row], r = rstd[row], count = static_cast<float>(cols);
    float mean_g, mean_gx;
    const auto terms = [=](int64_t j, float& a, float& b) {
      a = widen(g[j]) * w[j];
      b = a * ((widen(in[j]) - m) * r);
    };
    lane_sums(cols, terms, mean_g, mean_gx);
    mean_g /= count;
    mean_gx /= count;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j)
      out[j] = r * (widen(g[j]) * w[j] - mean_g - (widen(in[j]) - m) * r * mean_gx);
    if (dh == nullptr) return;
    const T* through = dh + row * dh_stride;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) out[j] += widen(through[j]);
  }

  FASTFT_INLINE void store(int64_t row, const float* from, uint32_t* words) const {
    const Mask drop = mask;
    T* out = dx + row * cols;
    T* other = dresidual + row * cols;
    if (drop.threshold == 0) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) narrow(from[j], out[j]);
      return;
    }
    const int64_t first = drop.draw(row, cols, words);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) narrow(drop(words, first + j, from[j]), out[j]);
    if (dresidual == nullptr) return;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) narrow(from[j], other[j]);
  }

  FASTFT_INLINE void add_sums(int64_t row, int64_t chunk) const {
    const T* g = dy + row * dy_stride;
    const T* in = h + row * h_stride;
    const float m = mean[row], r = rstd[row];
    if (weight_sums != nullptr) {
      float* sum = weight_sums + chunk * cols;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) sum[j] += widen(g[j]) * ((widen(in[j]) - m) * r);
    }
    if (bias_sums != nullptr) {
      float* sum = bias_sums + chunk * cols;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) sum[j] += widen(g[j]);
    }
  }
};

Mask mask_of(int64_t threshold, float scale, int64_t seed) {
  return {static_cast<uint32_t>(threshold), scale, static_cast<uint64_t>(seed)};
}

}  // namespace

void layer_norm_forward(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                        const void* weight, const void* bias, void* y, void* h, float* mean, float* rstd, int64_t rows,
                        int64_t cols, float eps, int64_t threshold, float scale, int64_t seed, DType dtype,
                        DType weight_dtype, int threads) {
  const std::vector<float> w = widened(weight, weight_dtype, cols), b = widened(bias, weight_dtype, cols);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(rows, rows * cols, threads,
                 Forward<T>{static_cast<const T*>(x), x_stride, static_cast<const T*>(residual), residual_stride,
                            w.data(), b.data(), static_cast<T*>(y), static_cast<T*>(h), mean, rstd, cols, eps,
                            mask_of(threshold, scale, seed)});
  });
}

void layer_norm_backward(const void* dy, int64_t dy_stride, const void* dh, int64_t dh_stride, const void* h,
                         int64_t h_stride, const void* weight, const float* mean, const float* rstd, void* dx,
                         void* dresidual, void* dweight, void* dbias, int64_t rows, int64_t cols, int64_t threshold,
                         float scale, int64_t seed, DType dtype, DType weight_dtype, int threads) {
  const Chunks chunks(rows);
  const std::vector<float> w = widened(weight, weight_dtype, cols);
  std::vector<float> weight_sums(dweight != nullptr ? chunks.count * cols : 0);
  std::vector<float> bias_sums(dbias != nullptr ? chunks.count * cols : 0);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(chunks.count, rows * cols, threads,
                 Backward<T>{static_cast<const T*>(dy), dy_stride, static_cast<const T*>(dh), dh_stride,
                             static_cast<const T*>(h), h_stride, w.data(), mean, rstd, static_cast<T*>(dx),
                             static_cast<T*>(dresidual), dweight != nullptr ? weight_sums.data() : nullptr,
                             dbias != nullptr ? bias_sums.data() : nullptr, cols, chunks,
                             mask_of(threshold, scale, seed)});
  });
  sum_chunks(weight_sums, dweight, weight_dtype, chunks.count, cols, threads);
  sum_chunks(bias_sums, dbias, weight_dtype, chunks.count, cols, threads);
}

}  // namespace fastft
