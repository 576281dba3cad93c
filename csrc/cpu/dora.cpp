// The rows' magnitudes of DoRA on the CPU. The equations are in kernels/fastft_kernels/reference/dora.py.
#include "cpu/dora.h"

#include <vector>

#include "common/columns.h"
#include "common/parallel.h"

namespace fastft {
namespace {

// Elements of a row at a time, widened, computed and narrowed in loops of their own, as in gelu.cpp.
constexpr int64_t kBlock = 64;

template <class T>
struct Forward {
  const T* z;
  int64_t z_stride;
  const float* gain;
  const T* u;
  int64_t u_stride;
  const float* gain_u;
  const float* bias;
  T* y;
  int64_t cols;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const { over_rows(begin, end, cols, *this); }

  FASTFT_INLINE void piece(int64_t row, int64_t first, int64_t width) const {
    const int64_t last = first + width;
    int64_t j = first;
    for (; j + kBlock <= last; j += kBlock) block(row, j, kBlock);
    block(row, j, last - j);
  }

  FASTFT_INLINE void block(int64_t row, int64_t first, int64_t n) const {
    const T* in = z + row * z_stride + first;
    T* out = y + row * cols + first;
    float h[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = widen(in[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = h[j] * gain[first + j] + bias[first + j];
    if (u != nullptr) {
      const T* second = u + row * u_stride + first;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) h[j] += widen(second[j]) * gain_u[first + j];
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(h[j], out[j]);
  }
};

// dz, and per chunk of rows the float sums from which dgain and dbias are added up.
template <class T>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* z;
  int64_t z_stride;
  const float* gain;
  T* dz;
  float* gains;
  float* biases;
  int64_t cols;
  Chunks chunks;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t row = chunks.first(chunk); row < chunks.last(chunk); ++row) {
        int64_t j = 0;
        for (; j + kBlock <= cols; j += kBlock) block(chunk, row, j, kBlock);
        block(chunk, row, j, cols - j);
      }
  }

  FASTFT_INLINE void block(int64_t chunk, int64_t row, int64_t first, int64_t n) const {
    const T* g = dy + row * dy_stride + first;
    T* out = dz + row * cols + first;
    float h[kBlock], scaled[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = widen(g[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scaled[j] = h[j] * gain[first + j];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(scaled[j], out[j]);
    if (gains != nullptr) {
      const T* in = z + row * z_stride + first;
      float* sum = gains + chunk * cols + first;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) scaled[j] = widen(in[j]);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sum[j] += h[j] * scaled[j];
    }
    if (biases != nullptr) {
      float* sum = biases + chunk * cols + first;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sum[j] += h[j];
    }
  }
};

}  // namespace

void dora_forward(const void* z, int64_t z_stride, const void* gain, const void* u, int64_t u_stride, const void* gain_u,
                  const void* bias, void* y, int64_t rows, int64_t cols, DType dtype, DType bias_dtype, int threads) {
  const std::vector<float> add = widened(bias, bias_dtype, cols);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(rows * cols, rows * cols, threads,
                 Forward<T>{static_cast<const T*>(z), z_stride, static_cast<const float*>(gain), static_cast<const T*>(u),
                            u_stride, static_cast<const float*>(gain_u), add.data(), static_cast<T*>(y), cols});
  });
}

void dora_backward(const void* dy, int64_t dy_stride, const void* z, int64_t z_stride, const void* gain, void* dz,
                   void* dgain, void* dbias, int64_t rows, int64_t cols, DType dtype, int threads) {
  const Chunks chunks(rows);
  std::vector<float> gains(dgain != nullptr ? chunks.count * cols : 0), biases(dbias != nullptr ? chunks.count * cols : 0);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(chunks.count, rows * cols, threads,
                 Backward<T>{static_cast<const T*>(dy), dy_stride, static_cast<const T*>(z), z_stride,
                             static_cast<const float*>(gain), static_cast<T*>(dz), dgain != nullptr ? gains.data() : nullptr,
                             dbias != nullptr ? biases.data() : nullptr, cols, chunks});
  });
  sum_chunks(gains, dgain, DType::float32, chunks.count, cols, threads);
  sum_chunks(biases, dbias, DType::float32, chunks.count, cols, threads);
}

}  // namespace fastft
