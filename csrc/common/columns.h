// The rows of a matrix in pieces, and vectors along its columns: parameters that every row reads, gradients that all rows
// add to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace fastft {

// Each of `cols` values plus `offset`, in float: read once per row, so they are widened once per call. Null: zeros.
inline std::vector<float> widened(const void* values, DType dtype, int64_t cols, float offset = 0.0f) {
  std::vector<float> wide(cols);
  if (values == nullptr) return wide;
  with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(values);
    for (int64_t j = 0; j < cols; ++j) wide[j] = offset + widen(from[j]);
  });
  return wide;
}

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

// How many rows a chunk has, each of which sums its own rows: a function of the problem alone.
struct Chunks {
  int64_t rows, rows_per_chunk, count;

  explicit Chunks(int64_t all) : rows(all) {
    constexpr int64_t kMinRows = 16, kMaxChunks = 256;
    rows_per_chunk = std::max(kMinRows, (rows + kMaxChunks - 1) / kMaxChunks);
    count = (rows + rows_per_chunk - 1) / rows_per_chunk;
  }

  int64_t first(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t last(int64_t chunk) const { return std::min(rows, (chunk + 1) * rows_per_chunk); }
};

// sums[j] = the sum of the chunks' partial sums, in chunk order.
template <class W>
struct SumChunks {
  const float* partial;
  W* sums;
  int64_t chunks;
  int64_t cols;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    constexpr int64_t kBlock = 64;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t width = std::min(kBlock, end - first);
      float sum[kBlock] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* from = partial + chunk * cols + first;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
      }
      for (int64_t j = 0; j < width; ++j) narrow(sum[j], sums[first + j]);
    }
  }
};

// Adds up `partial` [chunks, cols] into `sums` of `dtype`; does nothing where that is null.
inline void sum_chunks(const std::vector<float>& partial, void* sums, DType dtype, int64_t chunks, int64_t cols,
                       int threads) {
  if (sums == nullptr) return;
  with_type(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    parallel_for(cols, chunks * cols, threads, SumChunks<W>{partial.data(), static_cast<W*>(sums), chunks, cols});
  });
}

}  // namespace fastft
