// Small products of float matrices that lie in the first or second level cache.
//
// Here a fused multiply-add saves half of the instructions: these functions are compiled for vectors of W floats with
// contraction on, so that their last bits depend on the instruction set (never on the number of threads).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#define FASTFT_CONTRACT , optimize("fp-contract=fast")
#define FASTFT_CONTRACTED __attribute__((optimize("fp-contract=fast")))
#else
#define FASTFT_CONTRACT
#define FASTFT_CONTRACTED
#endif
#define FASTFT_AVX2 __attribute__((target("avx2,fma") FASTFT_CONTRACT))
#define FASTFT_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl") FASTFT_CONTRACT))

namespace fastft {

// Floats per vector of the running CPU: 16, 8 or 4.
inline int vector_width() {
#ifdef FASTFT_X86
  if (active_isa() == Isa::avx512) return 16;
  if (active_isa() == Isa::avx2 && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

#if defined(__GNUC__)
template <int W>
struct VectorOf {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
  typedef int index __attribute__((vector_size(W * sizeof(int))));
};
#else
template <int W>
struct VectorOf {
  struct type {
    float lane[W];
    type& operator+=(const type& other) {
      for (int i = 0; i < W; ++i) lane[i] += other.lane[i];
      return *this;
    }
    friend type operator*(float factor, type v) {
      for (int i = 0; i < W; ++i) v.lane[i] *= factor;
      return v;
    }
  };
};
#endif
template <int W>
using Vector = typename VectorOf<W>::type;

// c [MR, NR * W] = a b, or += a b, which is added as a whole: long sums made of short ones round less. a is
// [MR, inner], or its transpose with AT.
template <int W, int MR, int NR, bool AT, bool ADD>
FASTFT_INLINE void multiply_block(int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                  int64_t ldc) {
  Vector<W> sum[MR][NR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) sum[r][n] = Vector<W>{};
  for (int64_t k = 0; k < inner; ++k) {
    Vector<W> row[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) std::memcpy(&row[n], b + k * ldb + n * W, sizeof row[n]);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const float factor = AT ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[r][n] += factor * row[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      Vector<W> before{};
      if (ADD) std::memcpy(&before, c + r * ldc + n * W, sizeof before);
      if (ADD) sum[r][n] += before;
      std::memcpy(c + r * ldc + n * W, &sum[r][n], sizeof sum[r][n]);
    }
}

constexpr int kBlockRows = 6;

// Rows are shared out evenly over blocks: a block of one row would wait for its own additions.
template <int W, int NR, bool AT, bool ADD>
FASTFT_INLINE void multiply_rows(int64_t rows, int64_t inner, const float* a, int64_t lda, const float* b, int64_t ldb,
                                 float* c, int64_t ldc) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    const float* from = a + (AT ? first : first * lda);
    float* to = c + first * ldc;
    if (count == 6) multiply_block<W, 6, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
    if (count == 5) multiply_block<W, 5, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
    if (count == 4) multiply_block<W, 4, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
    if (count == 3) multiply_block<W, 3, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
    if (count == 2) multiply_block<W, 2, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
    if (count == 1) multiply_block<W, 1, NR, AT, ADD>(inner, from, lda, b, ldb, to, ldc);
  }
}

// c [rows, cols] (+)= a b, cols a multiple of W. AVX-512 has registers for blocks of 6 x 4 vectors, the others 6 x 2.
template <int W, bool AT, bool ADD>
FASTFT_INLINE void multiply_all(int64_t rows, int64_t cols, int64_t inner, const float* a, int64_t lda, const float* b,
                                int64_t ldb, float* c, int64_t ldc) {
  constexpr int kMost = W == 16 ? 4 : 2;
  for (int64_t j = 0; j < cols; j += kMost * W) {
    const int64_t vectors = std::min<int64_t>(kMost, (cols - j) / W);
    if (vectors == 4) multiply_rows<W, kMost, AT, ADD>(rows, inner, a, lda, b + j, ldb, c + j, ldc);
    if (vectors == 3) multiply_rows<W, kMost == 4 ? 3 : 1, AT, ADD>(rows, inner, a, lda, b + j, ldb, c + j, ldc);
    if (vectors == 2) multiply_rows<W, 2, AT, ADD>(rows, inner, a, lda, b + j, ldb, c + j, ldc);
    if (vectors == 1) multiply_rows<W, 1, AT, ADD>(rows, inner, a, lda, b + j, ldb, c + j, ldc);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
// Stage by stage, rows i and i + W / 2 are interleaved: after log2(W) stages the square is transposed.
template <int W>
FASTFT_INLINE void transpose_square(const float* from, int64_t ldf, float* to, int64_t ldt) {
  typename VectorOf<W>::index low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
  Vector<W> x[W], y[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(&x[i], from + i * ldf, sizeof x[i]);
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + W / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(to + i * ldt, &x[i], sizeof x[i]);
}
#else
template <int W>
FASTFT_INLINE void transpose_square(const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) std::memcpy(to + j * ldt + i, from + i * ldf + j, sizeof *to);
}
#endif

template <int W>
FASTFT_INLINE void transpose_all(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) transpose_square<W>(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
}

// The functions above, compiled once for each width; they may be called from code that is compiled for any.
template <int W>
struct Tile {
  template <bool AT, bool ADD>
  FASTFT_CONTRACTED static void multiply(int64_t rows, int64_t cols, int64_t inner, const float* a, int64_t lda,
                                         const float* b, int64_t ldb, float* c, int64_t ldc) {
    multiply_all<W, AT, ADD>(rows, cols, inner, a, lda, b, ldb, c, ldc);
  }
  // rows and cols: multiples of W
  static void transpose(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to, int64_t ldt) {
    transpose_all<W>(rows, cols, from, ldf, to, ldt);
  }
};

#ifdef FASTFT_X86
template <>
struct Tile<8> {
  template <bool AT, bool ADD>
  FASTFT_AVX2 static void multiply(int64_t rows, int64_t cols, int64_t inner, const float* a, int64_t lda,
                                   const float* b, int64_t ldb, float* c, int64_t ldc) {
    multiply_all<8, AT, ADD>(rows, cols, inner, a, lda, b, ldb, c, ldc);
  }
  FASTFT_AVX2 static void transpose(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to,
                                    int64_t ldt) {
    transpose_all<8>(rows, cols, from, ldf, to, ldt);
  }
};

template <>
struct Tile<16> {
  template <bool AT, bool ADD>
  FASTFT_AVX512 static void multiply(int64_t rows, int64_t cols, int64_t inner, const float* a, int64_t lda,
                                     const float* b, int64_t ldb, float* c, int64_t ldc) {
    multiply_all<16, AT, ADD>(rows, cols, inner, a, lda, b, ldb, c, ldc);
  }
  FASTFT_AVX512 static void transpose(int64_t rows, int64_t cols, const float* from, int64_t ldf, float* to,
                                      int64_t ldt) {
    transpose_all<16>(rows, cols, from, ldf, to, ldt);
  }
};
#endif

}  // namespace fastft
