// Products of bfloat16 matrices by instructions that multiply pairs: c += a0 b0 + a1 b1 in float.
//
// c [rows, cols] (+)= a b: a is [rows, inner] by rows, b lies in pairs of rows, element (2 k, j) in the low and (2 k + 1, j)
// in the high half of word [k, j]. cols is a multiple of kColumns, inner of kInner; a, b and c are that large, and zero
// where they are padded along inner. Below: the vectors of AVX512-BF16; amx.h: the tiles of AMX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/matrix.h"
#include "common/tile.h"

#ifdef FASTFT_X86_BF16
#include <immintrin.h>
#define FASTFT_AVX512_BF16 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16") FASTFT_CONTRACT))
#endif

namespace fastft {

// to [rows, width], zeros behind the `size` elements of each row of `from`, and in rows not in begin ... end - 1.
FASTFT_INLINE void copy_rows(const BFloat16* from, int64_t stride, int64_t size, int64_t rows, int64_t width, BFloat16* to,
                             int64_t begin, int64_t end) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = i >= begin && i < end ? size : 0;
    std::memcpy(to + i * width, from + i * stride, n * sizeof *to);
    std::memset(to + i * width + n, 0, (width - n) * sizeof *to);
  }
}

// Pairs of rows of `from` [rows, width].
FASTFT_INLINE void pair_rows(int64_t rows, int64_t width, const BFloat16* from, uint32_t* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const BFloat16* low = from + i * width;
    const BFloat16* high = low + width;
    uint32_t* out = to + i / 2 * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) out[j] = low[j].bits | uint32_t{high[j].bits} << 16;
  }
}

// Pairs of rows of the transpose of `from` [rows, width], `ld` words from one to the next; rows and width / 2: multiples of W.
template <int W>
FASTFT_INLINE void pair_columns(int64_t rows, int64_t width, const BFloat16* from, uint32_t* to, int64_t ld) {
  const float* words = reinterpret_cast<const float*>(from);  // moved as a whole, never computed with
  Tile<W>::transpose(rows, width / 2, words, width / 2, reinterpret_cast<float*>(to), ld);
}

// The rows that such pairs were made of.
FASTFT_INLINE void part_rows(int64_t rows, int64_t cols, const uint32_t* from, BFloat16* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += 2) {
    const uint32_t* words = from + i / 2 * ld;
    BFloat16* low = to + i * ld;
    BFloat16* high = low + ld;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      low[j].bits = static_cast<uint16_t>(words[j]);
      high[j].bits = static_cast<uint16_t>(words[j] >> 16);
    }
  }
}

#ifdef FASTFT_X86_BF16
struct VectorPairs {
  static constexpr int kWidth = 16, kColumns = 16, kInner = 2;

  struct Scope {};

  template <bool ADD>
  FASTFT_AVX512_BF16 static void multiply(int64_t rows, int64_t cols, int64_t inner, const BFloat16* a, int64_t lda,
                                          const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
    for (int64_t j = 0; j < cols; j += 64) {
      const int64_t vectors = std::min<int64_t>(4, (cols - j) / 16);
      if (vectors == 4) multiply_rows<4, ADD>(rows, inner / 2, a, lda, b + j, ldb, c + j, ldc);
      if (vectors == 3) multiply_rows<3, ADD>(rows, inner / 2, a, lda, b + j, ldb, c + j, ldc);
      if (vectors == 2) multiply_rows<2, ADD>(rows, inner / 2, a, lda, b + j, ldb, c + j, ldc);
      if (vectors == 1) multiply_rows<1, ADD>(rows, inner / 2, a, lda, b + j, ldb, c + j, ldc);
    }
  }

  // x [rows, cols] rounded, by rows and, unless null, in pairs of rows; rows is even.
  FASTFT_AVX512_BF16 static void narrow(int64_t rows, int64_t cols, const float* x, int64_t ld, BFloat16* by_rows,
                                        uint32_t* pairs) {
    alignas(64) int16_t order[32];
    for (int16_t j = 0; j < 16; ++j) order[2 * j] = j, order[2 * j + 1] = static_cast<int16_t>(16 + j);
    const __m512i interleave = _mm512_load_si512(order);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < cols; j += 16) {
        const float* from = x + i * ld + j;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + ld), _mm512_loadu_ps(from));
        if (by_rows != nullptr) {
          BFloat16* to = by_rows + i * ld + j;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + ld), _mm512_extracti64x4_epi64(both, 1));
        }
        if (pairs != nullptr) _mm512_storeu_si512(pairs + i / 2 * ld + j, _mm512_permutexvar_epi16(interleave, both));
      }
  }

 private:
  template <int NR, bool ADD>
  FASTFT_AVX512_BF16 static void multiply_rows(int64_t rows, int64_t pairs, const BFloat16* a, int64_t lda,
                                               const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
      const BFloat16* from = a + first * lda;
      float* to = c + first * ldc;
      if (count == 6) multiply_block<6, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
      if (count == 5) multiply_block<5, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
      if (count == 4) multiply_block<4, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
      if (count == 3) multiply_block<3, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
      if (count == 2) multiply_block<2, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
      if (count == 1) multiply_block<1, NR, ADD>(pairs, from, lda, b, ldb, to, ldc);
    }
  }

  template <int MR, int NR, bool ADD>
  FASTFT_AVX512_BF16 static void multiply_block(int64_t pairs, const BFloat16* a, int64_t lda, const uint32_t* b,
                                                int64_t ldb, float* c, int64_t ldc) {
    __m512 sum[MR][NR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
      __m512i row[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) row[n] = _mm512_loadu_si512(b + k * ldb + 16 * n);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + 2 * k, sizeof pair);
        const __m512i factor = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)factor, (__m512bh)row[n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        float* to = c + r * ldc + 16 * n;
        _mm512_storeu_ps(to, ADD ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][n]) : sum[r][n]);
      }
  }
};
#endif

}  // namespace fastft
