// Attention on the CPU, forward: a unit of work is some queries of all heads that share a key head.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/elementary.h"
#include "common/tile.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_tiles.h"

namespace fastft {
namespace {

constexpr int64_t kRowsPerUnit = 384;  // enough to pay for widening and transposing the keys

template <int W>
struct Forward {
  const Problem& p;

  static int64_t scratch(const Problem& p, const Unit& unit) {
    const int64_t width = (p.shape.head_size + W - 1) / W * W, rows = (unit.end - unit.begin) * p.group();
    return 2 * rows * width + 2 * rows + 3 * kKeys * width + kRows * kKeys + 16 * 8;
  }

  FASTFT_INLINE void operator()(const Unit& unit, float* scratch) const {
    const AttentionShape& s = p.shape;
    const Sequence sequence(p, unit.sequence);
    const int64_t D = s.head_size, width = (D + W - 1) / W * W, count = unit.end - unit.begin, group = p.group();
    float* q = take(scratch, count * group * width);
    float* o = take(scratch, count * group * width);
    float* top = take(scratch, count * group);
    float* total = take(scratch, count * group);
    float* rows = take(scratch, kKeys * width);
    float* kt = take(scratch, kKeys * width);
    float* v = take(scratch, kKeys * width);
    float* scores = take(scratch, kRows * kKeys);
    Keep<kRows> keep;

    std::fill(o, o + count * group * width, 0.0f);
    std::fill(top, top + count * group, -kInfinity);
    std::fill(total, total + count * group, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = unit.head_k * group + g;
      const int64_t from = at(s.q, sequence.batch, sequence.q_row + unit.begin, head);
      widen_rows(p, p.q, from, s.q[1], count, width, p.scale, q + g * count * width, 0, count);
    }
    const int64_t low = std::max<int64_t>(0, sequence.low(unit.begin, s.left)) / kKeys * kKeys;
    const int64_t high = sequence.high(unit.end - 1, s.right);
    for (int64_t key = low; key < high; key += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, high - key), padded = (keys + W - 1) / W * W;
      const int64_t row = sequence.k_row + key, real = sequence.first - key;
      const int64_t k_from = at(s.k, sequence.batch, row, unit.head_k);
      widen_rows(p, p.k, k_from, s.k[1], keys, width, 1.0f, rows, real, keys);
      std::fill(rows + keys * width, rows + padded * width, 0.0f);
      Tile<W>::transpose(padded, width, rows, width, kt, kKeys);
      const int64_t v_from = at(s.v, sequence.batch, row, unit.head_k);
      widen_rows(p, p.v, v_from, s.v[1], keys, width, 1.0f, v, real, keys);
      const int64_t tiles = (count + kRows - 1) / kRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i, query = unit.begin + i;
        if (sequence.low(query, s.left) >= key + keys || sequence.high(query + n - 1, s.right) <= key) continue;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t at_row = g * count + i;
          const uint32_t head = static_cast<uint32_t>(unit.head_k * group + g);
          Tile<W>::template multiply<false, false>(n, padded, D, q + at_row * width, width, kt, kKeys, scores, kKeys);
          if (s.threshold)
            keep.draw(p, sequence.random_row + static_cast<uint32_t>(query), n, key, keys, sequence.random_head + head);
          softmax(sequence, query, key, n, padded, scores, top + at_row, total + at_row, o + at_row * width, width);
          if (s.threshold)
            for (int64_t r = 0; r < n; ++r) keep.apply(r, keys, 1.0f, scores + r * kKeys);
          Tile<W>::template multiply<false, true>(n, width, keys, scores, kKeys, v, width, o + at_row * width, width);
        }
      }
    }
    const float kept = 1.0f - static_cast<float>(s.threshold) / 65536.0f;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = unit.head_k * group + g;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = g * count + i, query = sequence.q_row + unit.begin + i;
        const float sum = total[row];
        const int64_t token = sequence.batch * s.queries + query;
        const float factor = sum == 0.0f ? 0.0f : 1.0f / (sum * kept);
        narrow_row(o + row * width, D, factor, p.out, p.dtype, (token * s.heads + head) * D);
        p.lse_out[at(s.lse, sequence.batch, query, head)] = sum == 0.0f ? -kInfinity : top[row] + std::log(sum);
      }
    }
  }

  // Scores become exp(score - the largest so far), 0 where they are not seen; what was summed before is rescaled.
  FASTFT_INLINE void softmax(const Sequence& sequence, int64_t query, int64_t key, int64_t rows, int64_t cols, float* x,
                             float* top, float* total, float* o, int64_t width) const {
    float higher[kRows], shrink[kRows], pivot[kRows];
    if (p.softcap != 0.0f) {
      const float cap = p.softcap, inverse = 1.0f / cap;
      for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) x[r * kKeys + j] = cap * tanh_of(x[r * kKeys + j] * inverse);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      higher[r] = largest(x + r * kKeys, Seen(p, sequence, query + r, key, cols), static_cast<int>(cols), top[r]);
    // For all rows at once: one by one, each exponential would wait for the maximum before it.
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      pivot[r] = higher[r] == -kInfinity ? 0.0f : higher[r];
      shrink[r] = exp_of(top[r] - pivot[r]);
      total[r] *= shrink[r];
      top[r] = higher[r];
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Seen seen(p, sequence, query + r, key, cols);
      if (total[r] != 0.0f && shrink[r] != 1.0f) {
        float* row = o + r * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) row[j] *= shrink[r];
      }
      total[r] += exponentials(x + r * kKeys, seen, static_cast<int>(cols), pivot[r]);
    }
  }

  FASTFT_INLINE static float largest(const float* x, const Seen& seen, int cols, float top) {
    if (seen.all) {
#pragma omp simd reduction(max : top)
      for (int j = 0; j < cols; ++j) top = x[j] > top ? x[j] : top;
    } else {
#pragma omp simd reduction(max : top)
      for (int j = 0; j < cols; ++j) {
        const float value = (j >= seen.from) & (j < seen.to) ? x[j] : -kInfinity;
        top = value > top ? value : top;
      }
    }
    return top;
  }

  FASTFT_INLINE static float exponentials(float* x, const Seen& seen, int cols, float pivot) {
    float sum = 0.0f;
    if (seen.all) {
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < cols; ++j) sum += x[j] = exp_of_negative(x[j] - pivot);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < cols; ++j) sum += x[j] = (j >= seen.from) & (j < seen.to) ? exp_of_negative(x[j] - pivot) : 0.0f;
    }
    return sum;
  }
};

std::vector<Unit> forward_units(const Problem& p) {
  const int64_t step = std::max<int64_t>(kRows, kRowsPerUnit / p.group());
  std::vector<Unit> units;
  for (int64_t i = 0; i < p.shape.sequences; ++i) {
    const int64_t queries = Sequence(p, i).queries, parts = (queries + step - 1) / step;
    for (int64_t head = 0; head < p.shape.heads_k; ++head)
      for (int64_t part = parts - 1; part >= 0; --part)  // under a causal mask the last queries see most
        units.push_back({i, head, part, queries * part / parts, queries * (part + 1) / parts});
  }
  return units;
}

}  // namespace

void attention_forward(const AttentionShape* shape, const void* q, const void* k, const void* v,
                       const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, const int64_t* key_bounds, void* o,
                       float* lse, float scale, float softcap, uint64_t seed, DType dtype, int threads) {
  Problem p{*shape};
  p.q = q, p.k = k, p.v = v, p.out = o, p.lse_out = lse;
  p.cu_seqlens_q = cu_seqlens_q, p.cu_seqlens_k = cu_seqlens_k, p.key_bounds = key_bounds;
  p.scale = scale, p.softcap = softcap, p.seed = seed, p.dtype = dtype;
  const std::vector<Unit> units = forward_units(p);
  run_units(p, units, work_of(p), threads, in_pairs(p) ? forward_in_pairs() : runner<Forward>());
}

}  // namespace fastft
