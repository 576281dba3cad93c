// Attention of bfloat16 by instructions that multiply pairs (common/pairs.h): what both passes share.
//
// A tile of scores is kept transposed, a row for each key: what belongs to a query (maximum, sum, lse, delta) is then a
// vector beside it, probabilities are the pairs that the next product reads, and o and dq are computed transposed too.
#pragma once

#include "common/amx.h"
#include "cpu/attention_tiles.h"

namespace fastft {

constexpr int kQueries = 64;  // columns of a tile
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Whether a call is computed in pairs, and how.
bool in_pairs(const Problem& p);
Runner forward_in_pairs();
Runner backward_in_pairs();

// Columns of a padded head: pairs of them are transposed 16 by 16.
inline int64_t padded_head(const Problem& p) { return (p.shape.head_size + 31) / 32 * 32; }

FASTFT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A tile: queries begin ... begin + count - 1 against keys key ... key + keys - 1; which of its queries each key is seen by.
struct PairTile {
  const Sequence& sequence;
  int64_t begin, count, key, keys, left, right;

  FASTFT_INLINE bool none() const {
    return sequence.low(begin, left) >= key + keys || sequence.high(begin + count - 1, right) <= key;
  }
  FASTFT_INLINE bool all(int64_t padded) const {
    return sequence.low(begin + count - 1, left) <= key && sequence.high(begin, right) >= key + padded;
  }
  // Only columns from ... to - 1 see key `key + r`.
  FASTFT_INLINE void seen(int64_t r, int& from, int& to) const {
    const int64_t j = key + r, row = j - sequence.offset - begin;
    const bool real = j >= sequence.first && j < sequence.end && r < keys;
    from = static_cast<int>(std::min<int64_t>(std::max<int64_t>(row - right, 0), kQueries));
    to = real ? static_cast<int>(std::min<int64_t>(row + left + 1, count)) : 0;
  }
};

// x[j] *= factor where the query of column j keeps key r, else 0
FASTFT_INLINE void keep_columns(const Keep<kQueries>& keep, int64_t r, int64_t cols, float factor, float* x) {
  const uint32_t* bits = keep.bits[r / 8];
  const uint32_t bit = static_cast<uint32_t>(r % 8);
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) x[j] = (bits[j] >> bit) & 1u ? x[j] * factor : 0.0f;
}

#ifdef FASTFT_X86_BF16
template <class Body>
FASTFT_AVX512_BF16 void run_pairs_16(const Problem& p, const Unit& unit, float* scratch) {
  Body{p}(unit, scratch);
}
#endif

template <template <class> class Body>
Runner pair_runner() {
#ifdef FASTFT_X86_BF16
  if (active_matrix() == Matrix::avx512_bf16) return {run_pairs_16<Body<VectorPairs>>, Body<VectorPairs>::scratch};
#endif
#ifdef FASTFT_X86_AMX
  if (active_matrix() == Matrix::amx_bf16) return {run_pairs_16<Body<AmxPairs>>, Body<AmxPairs>::scratch};
#endif
  return {run_4<Body<EmulatedPairs>>, Body<EmulatedPairs>::scratch};
}

}  // namespace fastft
