// Attention in pairs of bfloat16, backward: units of work as in attention_backward.cpp.
#include <algorithm>

#include "common/elementary.h"
#include "cpu/attention_pairs.h"

namespace fastft {
namespace {

constexpr int kMostHeadSize = 256;

template <class Pairs>
struct PairBackward {
  const Problem& p;

  static int64_t scratch(const Problem& p, const Unit& unit) {
    const int64_t width = padded_head(p), queries = Sequence(p, unit.sequence).queries;
    const int64_t tiles = (queries + kQueries - 1) / kQueries * p.group();
    const int64_t of_tile = width * kQueries * 3 + 2 * kQueries;
    return tiles * of_tile + (kKeys * 9 / 2 + kQueries) * width + kKeys * kQueries * 9 / 2 + 16 * 24;
  }

  FASTFT_INLINE void operator()(const Unit& unit, float* scratch) const {
    [[maybe_unused]] const typename Pairs::Scope scope;
    const AttentionShape& s = p.shape;
    const Sequence sequence(p, unit.sequence);
    const int64_t D = s.head_size, width = padded_head(p), count = sequence.queries, group = p.group();
    const int64_t tiles = (count + kQueries - 1) / kQueries, of_tile = width / 2 * kQueries;
    const int64_t inner = round_up(D, Pairs::kInner), columns = round_up(D, 16);
    float* dq = take(scratch, tiles * group * width * kQueries);
    uint32_t* q_columns = take<uint32_t>(scratch, tiles * group * of_tile);
    uint32_t* q_rows = take<uint32_t>(scratch, tiles * group * of_tile);
    uint32_t* dout_columns = take<uint32_t>(scratch, tiles * group * of_tile);
    uint32_t* dout_rows = take<uint32_t>(scratch, tiles * group * of_tile);
    float* lse = take(scratch, tiles * group * kQueries);
    float* delta = take(scratch, tiles * group * kQueries);
    BFloat16* k = take<BFloat16>(scratch, kKeys * width);
    BFloat16* v = take<BFloat16>(scratch, kKeys * width);
    BFloat16* kt = take<BFloat16>(scratch, kKeys * width);
    uint32_t* words = take<uint32_t>(scratch, kKeys * width / 2);
    float* dk = take(scratch, kKeys * width);
    float* dv = take(scratch, kKeys * width);
    float* x = take(scratch, kKeys * kQueries);
    float* dx = take(scratch, kKeys * kQueries);
    float* slope = take(scratch, kKeys * kQueries);
    BFloat16* probabilities = take<BFloat16>(scratch, kKeys * kQueries);
    BFloat16* ds_rows = take<BFloat16>(scratch, kKeys * kQueries);
    uint32_t* ds_pairs = take<uint32_t>(scratch, kKeys / 2 * kQueries);
    float* rows = take(scratch, kQueries * width);
    BFloat16* staged = reinterpret_cast<BFloat16*>(rows);
    Keep<kQueries> keep;

    // Where a tile has all the keys of a row, delta is the sum of p dp, without the rounding of o.
    const bool whole = sequence.keys <= kKeys;
    const float kept = 1.0f - static_cast<float>(s.threshold) / 65536.0f;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i, number = tile * group + g;
        const int64_t head = unit.head_k * group + g, row = sequence.q_row + i, cols = round_up(n, Pairs::kColumns);
        float* to = dq + number * width * kQueries;
        for (int64_t d = 0; d < width; ++d) std::fill(to + d * kQueries, to + d * kQueries + cols, 0.0f);
        const BFloat16* q_from = static_cast<const BFloat16*>(p.q) + at(s.q, sequence.batch, row, head);
        copy_rows(q_from, s.q[1], D, cols, width, staged, 0, n);
        pair_columns<Pairs::kWidth>(cols, width, staged, q_columns + number * of_tile, kQueries);
        pair_rows(cols, width, staged, q_rows + number * of_tile);
        const BFloat16* dout_from = static_cast<const BFloat16*>(p.dout) + at(s.dout, sequence.batch, row, head);
        copy_rows(dout_from, s.dout[1], D, cols, width, staged, 0, n);
        pair_columns<Pairs::kWidth>(cols, width, staged, dout_columns + number * of_tile, kQueries);
        pair_rows(cols, width, staged, dout_rows + number * of_tile);
        gather(sequence, row, n, head, whole, lse + number * kQueries, delta + number * kQueries);
      }

    for (int64_t key = unit.begin; key < unit.end; key += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, unit.end - key), padded = round_up(keys, Pairs::kInner);
      const int64_t filled = round_up(keys, Pairs::kColumns);
      const int64_t row = sequence.k_row + key, real = sequence.first - key, end = std::min(keys, sequence.end - key);
      const BFloat16* k_from = static_cast<const BFloat16*>(p.k) + at(s.k, sequence.batch, row, unit.head_k);
      copy_rows(k_from, s.k[1], D, filled, width, k, real, end);
      pair_columns<Pairs::kWidth>(filled, width, k, words, kKeys);
      part_rows(width, filled, words, kt, kKeys);
      const BFloat16* v_from = static_cast<const BFloat16*>(p.v) + at(s.v, sequence.batch, row, unit.head_k);
      copy_rows(v_from, s.v[1], D, filled, width, v, real, end);
      std::fill(dk, dk + filled * width, 0.0f);
      std::fill(dv, dv + filled * width, 0.0f);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i;
        const int64_t cols = round_up(n, Pairs::kColumns);
        const PairTile seen{sequence, i, n, key, keys, s.left, s.right};
        if (seen.none()) continue;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t number = tile * group + g;
          Pairs::template multiply<false>(padded, cols, inner, k, width, q_columns + number * of_tile, kQueries, x,
                                          kQueries);
          Pairs::template multiply<false>(padded, cols, inner, v, width, dout_columns + number * of_tile, kQueries, dx,
                                          kQueries);
          exponentials(seen, padded, cols, lse + number * kQueries, x, slope);
          if (s.threshold) {
            keep.draw(p, sequence.random_row + static_cast<uint32_t>(i), n, key, keys,
                      sequence.random_head + static_cast<uint32_t>(unit.head_k * group + g));
            for (int64_t r = 0; r < keys; ++r) keep_columns(keep, r, cols, 1.0f / kept, dx + r * kQueries);
          }
          score_gradients(padded, cols, delta + number * kQueries, whole, x, slope, dx);
          if (s.threshold)
            for (int64_t r = 0; r < keys; ++r) keep_columns(keep, r, cols, 1.0f / kept, x + r * kQueries);
          Pairs::narrow(padded, cols, x, kQueries, probabilities, nullptr);
          Pairs::narrow(padded, cols, dx, kQueries, ds_rows, ds_pairs);
          Pairs::template multiply<true>(keys, columns, cols, probabilities, kQueries, dout_rows + number * of_tile, width,
                                         dv, width);
          Pairs::template multiply<true>(keys, columns, cols, ds_rows, kQueries, q_rows + number * of_tile, width, dk,
                                         width);
          Pairs::template multiply<true>(D, cols, padded, kt, kKeys, ds_pairs, kQueries, dq + number * width * kQueries,
                                         kQueries);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t to = ((sequence.batch * s.keys + row + j) * s.heads_k + unit.head_k) * D;
        narrow_row(dk + j * width, D, p.scale, static_cast<BFloat16*>(p.dk) + to);
        narrow_row(dv + j * width, D, 1.0f, static_cast<BFloat16*>(p.dv) + to);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i;
        Tile<Pairs::kWidth>::transpose(width, round_up(n, Pairs::kColumns), dq + (tile * group + g) * width * kQueries,
                                       kQueries, rows, width);
        for (int64_t r = 0; r < n; ++r) {
          const int64_t token = sequence.batch * s.queries + sequence.q_row + i + r;
          const int64_t to = (token * s.heads + unit.head_k * group + g) * D;
          if (p.dq_parts == nullptr)
            narrow_row(rows + r * width, D, p.scale, static_cast<BFloat16*>(p.dq) + to);
          else
            narrow_row(rows + r * width, D, p.scale, p.dq_parts + unit.part * s.tokens * s.heads * D + to);
        }
      }
  }

  // lse of n rows in powers of 2, infinite where a row sees nothing or is padding; and delta = do . o - dlse, without
  // do . o where it comes from a whole tile.
  FASTFT_INLINE void gather(const Sequence& sequence, int64_t row, int64_t n, int64_t head, bool whole, float* lse,
                            float* delta) const {
    const AttentionShape& s = p.shape;
    float dout[kMostHeadSize], o[kMostHeadSize];
    for (int64_t i = 0; i < kQueries; ++i) lse[i] = kInfinity, delta[i] = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float value = p.lse[at(s.lse, sequence.batch, row + i, head)];
      lse[i] = value == -kInfinity ? kInfinity : value * kLog2E;
      float dot = p.dlse == nullptr ? 0.0f : -p.dlse[at(s.dlse, sequence.batch, row + i, head)];
      if (!whole) {
        const int64_t o_from = ((sequence.batch * s.queries + row + i) * s.heads + head) * s.head_size;
        widen_row(static_cast<const BFloat16*>(p.dout) + at(s.dout, sequence.batch, row + i, head), s.head_size, 1.0f, dout);
        widen_row(static_cast<const BFloat16*>(p.o) + o_from, s.head_size, 1.0f, o);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < s.head_size; ++d) sum += dout[d] * o[d];
        dot += sum;
      }
      delta[i] = dot;
    }
  }

  // Scores become probabilities, and slope the derivative of the soft-capped score.
  FASTFT_INLINE void exponentials(const PairTile& seen, int64_t rows, int64_t cols, const float* lse, float* x,
                                  float* slope) const {
    float scale = p.scale * kLog2E;
    if (p.softcap != 0.0f) {
      const float cap = p.softcap * kLog2E, inverse = p.scale / p.softcap;
      for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) {
          const float t = tanh_of(x[r * kQueries + j] * inverse);
          x[r * kQueries + j] = cap * t;
          slope[r * kQueries + j] = 1.0f - t * t;
        }
      }
      scale = 1.0f;
    }
    const bool all = seen.all(rows);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = x + r * kQueries;
      if (all) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) row[j] = exp2_of_negative(row[j] * scale - lse[j]);
      } else {
        int from, to;
        seen.seen(r, from, to);
#pragma omp simd
        for (int j = 0; j < static_cast<int>(cols); ++j)
          row[j] = (j >= from) & (j < to) ? exp2_of_negative(row[j] * scale - lse[j]) : 0.0f;
      }
    }
  }

  // Gradients of the probabilities become those of the scores.
  FASTFT_INLINE void score_gradients(int64_t rows, int64_t cols, const float* delta, bool whole, const float* x,
                                     const float* slope, float* dx) const {
    alignas(64) float sum[kQueries];
    for (int64_t j = 0; j < cols; ++j) sum[j] = delta[j];
    if (whole)
      for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) sum[j] += x[r * kQueries + j] * dx[r * kQueries + j];
      }
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j)
        dx[r * kQueries + j] = x[r * kQueries + j] * (dx[r * kQueries + j] - sum[j]);
    }
    if (p.softcap != 0.0f)
      for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) dx[r * kQueries + j] *= slope[r * kQueries + j];
      }
  }
};

}  // namespace

Runner backward_in_pairs() { return pair_runner<PairBackward>(); }

}  // namespace fastft
