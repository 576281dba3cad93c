// GELU on the CPU, with a bias that is added first. The equations are in kernels/fastft_kernels/reference/gelu.py.
#include "cpu/gelu.h"

#include <vector>

#include "common/columns.h"
#include "common/parallel.h"

namespace fastft {
namespace {

// Elements of a row at a time. They are widened, computed and narrowed in loops of their own: with 16 and 32 bits in one
// loop the compiler fills its registers less well, and half the speed is gone.
constexpr int64_t kBlock = 64;

template <class T, class Act>
struct Forward {
  const T* x;
  int64_t x_stride;
  const float* bias;
  T* y;
  int64_t cols;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const { over_rows(begin, end, cols, *this); }

  FASTFT_INLINE void piece(int64_t row, int64_t first, int64_t width) const {
    const T* in = x + row * x_stride + first;
    const float* add = bias + first;
    T* out = y + row * cols + first;
    int64_t j = 0;
    for (; j + kBlock <= width; j += kBlock) block(in + j, add + j, out + j, kBlock);
    block(in + j, add + j, out + j, width - j);
  }

  FASTFT_INLINE void block(const T* in, const float* add, T* out, int64_t n) const {
    float h[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = widen(in[j]) + add[j];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = Act::value(h[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(h[j], out[j]);
  }
};

// dx, and where `sums` is not null, per chunk of rows the float sums of it, from which dbias is added up.
template <class T, class Act>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride;
  const float* bias;
  T* dx;
  float* sums;
  int64_t cols;
  Chunks chunks;

  // Of the chunks where there are sums, else of the elements.
  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    if (sums == nullptr) return over_rows(begin, end, cols, *this);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t row = chunks.first(chunk); row < chunks.last(chunk); ++row) add_piece(row, 0, cols, sums + chunk * cols);
  }

  FASTFT_INLINE void piece(int64_t row, int64_t first, int64_t width) const { add_piece(row, first, width, nullptr); }

  FASTFT_INLINE void add_piece(int64_t row, int64_t first, int64_t width, float* sum) const {
    const T* g = dy + row * dy_stride + first;
    const T* in = x + row * x_stride + first;
    const float* add = bias + first;
    T* out = dx + row * cols + first;
    int64_t j = 0;
    for (; j + kBlock <= width; j += kBlock)
      block(g + j, in + j, add + j, out + j, sum == nullptr ? nullptr : sum + j, kBlock);
    block(g + j, in + j, add + j, out + j, sum == nullptr ? nullptr : sum + j, width - j);
  }

  FASTFT_INLINE void block(const T* g, const T* in, const float* add, T* out, float* sum, int64_t n) const {
    float h[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = widen(in[j]) + add[j];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] = Act::slope(h[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) h[j] *= widen(g[j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(h[j], out[j]);
    if (sum == nullptr) return;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += h[j];
  }
};

}  // namespace

void gelu_forward(const void* x, int64_t x_stride, const void* bias, void* y, int64_t rows, int64_t cols,
                  Activation activation, DType dtype, DType bias_dtype, int threads) {
  const std::vector<float> add = widened(bias, bias_dtype, cols);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [&](auto act) {
      using Act = typename decltype(act)::type;
      parallel_for(rows * cols, rows * cols, threads,
                   Forward<T, Act>{static_cast<const T*>(x), x_stride, add.data(), static_cast<T*>(y), cols});
    });
  });
}

void gelu_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* bias, void* dx,
                   void* dbias, int64_t rows, int64_t cols, Activation activation, DType dtype, DType bias_dtype,
                   int threads) {
  const Chunks chunks(rows);
  const std::vector<float> add = widened(bias, bias_dtype, cols);
  std::vector<float> sums(dbias != nullptr ? chunks.count * cols : 0);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_activation<T>(activation, [&](auto act) {
      using Act = typename decltype(act)::type;
      const bool summed = dbias != nullptr;
      parallel_for(summed ? chunks.count : rows * cols, rows * cols, threads,
                   Backward<T, Act>{static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, add.data(),
                                    static_cast<T*>(dx), summed ? sums.data() : nullptr, cols, chunks});
    });
  });
  sum_chunks(sums, dbias, bias_dtype, chunks.count, cols, threads);
}

}  // namespace fastft
