// Attention in pairs of bfloat16, forward: units of work as in attention_forward.cpp.
#include <algorithm>
#include <cmath>

#include "common/elementary.h"
#include "cpu/attention_pairs.h"

namespace fastft {
namespace {

template <class Pairs>
struct PairForward {
  const Problem& p;

  static int64_t scratch(const Problem& p, const Unit& unit) {
    const int64_t width = padded_head(p), tiles = (unit.end - unit.begin + kQueries - 1) / kQueries * p.group();
    const int64_t of_tile = width * kQueries + width / 2 * kQueries + 2 * kQueries;
    return tiles * of_tile + 2 * kKeys * width + kKeys * kQueries * 3 / 2 + kQueries * width + 16 * 8;
  }

  FASTFT_INLINE void operator()(const Unit& unit, float* scratch) const {
    [[maybe_unused]] const typename Pairs::Scope scope;
    const AttentionShape& s = p.shape;
    const Sequence sequence(p, unit.sequence);
    const int64_t D = s.head_size, width = padded_head(p), count = unit.end - unit.begin, group = p.group();
    const int64_t tiles = (count + kQueries - 1) / kQueries;
    uint32_t* q = take<uint32_t>(scratch, tiles * group * width / 2 * kQueries);
    float* o = take(scratch, tiles * group * width * kQueries);
    float* top = take(scratch, tiles * group * kQueries);
    float* total = take(scratch, tiles * group * kQueries);
    BFloat16* k = take<BFloat16>(scratch, kKeys * width);
    BFloat16* v = take<BFloat16>(scratch, kKeys * width);
    uint32_t* words = take<uint32_t>(scratch, kKeys * width / 2);
    BFloat16* vt = take<BFloat16>(scratch, kKeys * width);
    float* x = take(scratch, kKeys * kQueries);
    uint32_t* probabilities = take<uint32_t>(scratch, kKeys / 2 * kQueries);
    float* rows = take(scratch, kQueries * width);
    BFloat16* staged = reinterpret_cast<BFloat16*>(rows);
    Keep<kQueries> keep;

    std::fill(top, top + tiles * group * kQueries, -kInfinity);
    std::fill(total, total + tiles * group * kQueries, 0.0f);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i;
        const int64_t number = tile * group + g, cols = round_up(n, Pairs::kColumns);
        const int64_t from = at(s.q, sequence.batch, sequence.q_row + unit.begin + i, unit.head_k * group + g);
        copy_rows(static_cast<const BFloat16*>(p.q) + from, s.q[1], D, cols, width, staged, 0, n);
        pair_columns<Pairs::kWidth>(cols, width, staged, q + number * width / 2 * kQueries, kQueries);
        float* out = o + number * width * kQueries;
        for (int64_t d = 0; d < width; ++d) std::fill(out + d * kQueries, out + d * kQueries + cols, 0.0f);
      }
    const int64_t low = std::max<int64_t>(0, sequence.low(unit.begin, s.left)) / kKeys * kKeys;
    const int64_t high = sequence.high(unit.end - 1, s.right);
    for (int64_t key = low; key < high; key += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, high - key);
      const int64_t padded = round_up(keys, Pairs::kInner), filled = round_up(keys, Pairs::kColumns);
      const int64_t row = sequence.k_row + key, real = sequence.first - key;
      const BFloat16* k_from = static_cast<const BFloat16*>(p.k) + at(s.k, sequence.batch, row, unit.head_k);
      copy_rows(k_from, s.k[1], D, filled, width, k, real, keys);
      const BFloat16* v_from = static_cast<const BFloat16*>(p.v) + at(s.v, sequence.batch, row, unit.head_k);
      copy_rows(v_from, s.v[1], D, filled, width, v, real, keys);
      pair_columns<Pairs::kWidth>(filled, width, v, words, kKeys);
      part_rows(width, filled, words, vt, kKeys);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i;
        const int64_t cols = round_up(n, Pairs::kColumns);
        const PairTile seen{sequence, unit.begin + i, n, key, keys, s.left, s.right};
        if (seen.none()) continue;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t number = tile * group + g;
          float* out = o + number * width * kQueries;
          Pairs::template multiply<false>(padded, cols, round_up(D, Pairs::kInner), k, width, q + number * width / 2 * kQueries, kQueries,
                                          x, kQueries);
          softmax(seen, padded, cols, x, top + number * kQueries, total + number * kQueries, out);
          if (s.threshold) {
            keep.draw(p, sequence.random_row + static_cast<uint32_t>(unit.begin + i), n, key, keys,
                      sequence.random_head + static_cast<uint32_t>(unit.head_k * group + g));
            for (int64_t r = 0; r < keys; ++r) keep_columns(keep, r, cols, 1.0f, x + r * kQueries);
          }
          Pairs::narrow(padded, cols, x, kQueries, nullptr, probabilities);
          Pairs::template multiply<true>(D, cols, padded, vt, kKeys, probabilities, kQueries, out, kQueries);
        }
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i, number = tile * group + g;
        write(sequence, unit.begin + i, n, unit.head_k * group + g, top + number * kQueries, total + number * kQueries,
              o + number * width * kQueries, rows);
      }
  }

  // Scores become 2^(score - the largest so far), 0 where they are not seen; what was summed before is rescaled.
  FASTFT_INLINE void softmax(const PairTile& seen, int64_t rows, int64_t cols, float* x, float* top, float* total,
                             float* o) const {
    alignas(64) float highest[kQueries], shrink[kQueries], sum[kQueries];
    float scale = p.scale * kLog2E;
    if (p.softcap != 0.0f) {
      const float cap = p.softcap * kLog2E, inverse = p.scale / p.softcap;
      for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) x[r * kQueries + j] = cap * tanh_of(x[r * kQueries + j] * inverse);
      }
      scale = 1.0f;
    }
    if (!seen.all(rows))
      for (int64_t r = 0; r < rows; ++r) {
        int from, to;
        seen.seen(r, from, to);
#pragma omp simd
        for (int j = 0; j < static_cast<int>(cols); ++j)
          x[r * kQueries + j] = (j >= from) & (j < to) ? x[r * kQueries + j] : -kInfinity;
      }
    for (int64_t j = 0; j < cols; ++j) highest[j] = top[j];
    for (int64_t r = 0; r < rows; r += 2) {
      const float* a = x + r * kQueries;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) {
        const float first = a[j] * scale, second = a[j + kQueries] * scale;
        const float larger = first > second ? first : second;
        highest[j] = larger > highest[j] ? larger : highest[j];
      }
    }
    bool same = true;
#pragma omp simd reduction(& : same)
    for (int64_t j = 0; j < cols; ++j) {
      const float pivot = highest[j] == -kInfinity ? 0.0f : highest[j];
      shrink[j] = exp2_of_negative(top[j] - pivot);
      same &= (top[j] == highest[j]) | (total[j] == 0.0f);
      total[j] *= shrink[j];
      top[j] = highest[j];
      highest[j] = pivot;
      sum[j] = 0.0f;
    }
    if (!same)
      for (int64_t d = 0; d < p.shape.head_size; ++d) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) o[d * kQueries + j] *= shrink[j];
      }
    const bool all = seen.all(rows);
    for (int64_t r = 0; r < rows; r += 2) {
      float* a = x + r * kQueries;
      if (all) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) {
          const float first = exp2_of_negative(a[j] * scale - highest[j]);
          const float second = exp2_of_negative(a[j + kQueries] * scale - highest[j]);
          a[j] = first;
          a[j + kQueries] = second;
          sum[j] += first + second;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) {
          const float u = a[j] * scale - highest[j], w = a[j + kQueries] * scale - highest[j];
          const float first = u == -kInfinity ? 0.0f : exp2_of_negative(u);
          const float second = w == -kInfinity ? 0.0f : exp2_of_negative(w);
          a[j] = first;
          a[j + kQueries] = second;
          sum[j] += first + second;
        }
      }
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) total[j] += sum[j];
  }

  // Rows of o and lse of one tile. rows: memory for it.
  FASTFT_INLINE void write(const Sequence& sequence, int64_t query, int64_t n, int64_t head, const float* top,
                           const float* total, float* o, float* rows) const {
    const AttentionShape& s = p.shape;
    const int64_t D = s.head_size, width = padded_head(p);
    const float kept = 1.0f - static_cast<float>(s.threshold) / 65536.0f;
    Tile<Pairs::kWidth>::transpose(width, round_up(n, Pairs::kColumns), o, kQueries, rows, width);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = sequence.q_row + query + r, token = sequence.batch * s.queries + row;
      const bool none = total[r] == 0.0f;
      narrow_row(rows + r * width, D, none ? 0.0f : 1.0f / (total[r] * kept),
                 static_cast<BFloat16*>(p.out) + (token * s.heads + head) * D);
      p.lse_out[at(s.lse, sequence.batch, row, head)] = none ? -kInfinity : top[r] * kLn2 + std::log(total[r]);
    }
  }
};

}  // namespace

bool in_pairs(const Problem& p) {
  constexpr int64_t kLeastQueries = 16;  // of a sequence, on average: with fewer, most columns of a tile are padding
  if (p.dtype != DType::bfloat16 || active_matrix() == Matrix::none) return false;
  if (active_matrix() == Matrix::emulated) return true;
  return active_isa() == Isa::avx512 && p.shape.tokens >= kLeastQueries * p.shape.sequences;
}

Runner forward_in_pairs() { return pair_runner<PairForward>(); }

}  // namespace fastft
