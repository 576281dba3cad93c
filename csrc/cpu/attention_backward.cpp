// Attention on the CPU, backward: a unit of work is the keys of one head of a sequence. Where that makes few units, the keys
// are split, and the parts of dq added up in their order.
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "common/elementary.h"
#include "common/parallel.h"
#include "common/tile.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_tiles.h"

namespace fastft {
namespace {

constexpr int kMostHeadSize = 256;

template <int W>
struct Backward {
  const Problem& p;

  static int64_t scratch(const Problem& p, const Unit& unit) {
    const int64_t width = (p.shape.head_size + W - 1) / W * W;
    const int64_t rows = Sequence(p, unit.sequence).queries * p.group();
    return rows * width + 2 * rows + (6 * kKeys + 2 * kRows) * width + 3 * kRows * kKeys + 16 * 16;
  }

  FASTFT_INLINE void operator()(const Unit& unit, float* scratch) const {
    const AttentionShape& s = p.shape;
    const Sequence sequence(p, unit.sequence);
    const int64_t D = s.head_size, width = (D + W - 1) / W * W, count = sequence.queries, group = p.group();
    float* dq = take(scratch, count * group * width);
    float* lse = take(scratch, count * group);
    float* delta = take(scratch, count * group);
    float* k = take(scratch, kKeys * width);
    float* kt = take(scratch, kKeys * width);
    float* v = take(scratch, kKeys * width);
    float* vt = take(scratch, kKeys * width);
    float* dk = take(scratch, kKeys * width);
    float* dv = take(scratch, kKeys * width);
    float* q = take(scratch, kRows * width);
    float* dout = take(scratch, kRows * width);
    float* x = take(scratch, kRows * kKeys);
    float* dx = take(scratch, kRows * kKeys);
    float* slope = take(scratch, kRows * kKeys);
    Keep<kRows> keep;

    std::fill(dq, dq + count * group * width, 0.0f);
    // Where a tile has all the keys of a row, delta is the sum of p dp, without the rounding of o.
    const bool whole = sequence.keys <= kKeys;
    const float kept = 1.0f - static_cast<float>(s.threshold) / 65536.0f;
    for (int64_t g = 0; g < group; ++g)
      gather_rows(sequence, unit.head_k * group + g, whole, lse + g * count, delta + g * count);

    for (int64_t key = unit.begin; key < unit.end; key += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, unit.end - key), padded = (keys + W - 1) / W * W;
      const int64_t row = sequence.k_row + key, real = sequence.first - key, end = sequence.end - key;
      const int64_t k_from = at(s.k, sequence.batch, row, unit.head_k);
      widen_rows(p, p.k, k_from, s.k[1], keys, width, 1.0f, k, real, end);
      std::fill(k + keys * width, k + padded * width, 0.0f);
      Tile<W>::transpose(padded, width, k, width, kt, kKeys);
      const int64_t v_from = at(s.v, sequence.batch, row, unit.head_k);
      widen_rows(p, p.v, v_from, s.v[1], keys, width, 1.0f, v, real, end);
      std::fill(v + keys * width, v + padded * width, 0.0f);
      Tile<W>::transpose(padded, width, v, width, vt, kKeys);
      std::fill(dk, dk + keys * width, 0.0f);
      std::fill(dv, dv + keys * width, 0.0f);
      const int64_t tiles = (count + kRows - 1) / kRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = count * tile / tiles, n = count * (tile + 1) / tiles - i;
        if (sequence.low(i, s.left) >= key + keys || sequence.high(i + n - 1, s.right) <= key) continue;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t head = unit.head_k * group + g, at_row = g * count + i;
          const int64_t q_from = at(s.q, sequence.batch, sequence.q_row + i, head);
          widen_rows(p, p.q, q_from, s.q[1], n, width, p.scale, q, 0, n);
          const int64_t dout_from = at(s.dout, sequence.batch, sequence.q_row + i, head);
          widen_rows(p, p.dout, dout_from, s.dout[1], n, width, 1.0f, dout, 0, n);
          Tile<W>::template multiply<false, false>(n, padded, D, q, width, kt, kKeys, x, kKeys);
          Tile<W>::template multiply<false, false>(n, padded, D, dout, width, vt, kKeys, dx, kKeys);
          if (s.threshold)
            keep.draw(p, sequence.random_row + static_cast<uint32_t>(i), n, key, keys,
                      sequence.random_head + static_cast<uint32_t>(head));
          for (int64_t r = 0; r < n; ++r) {
            float* xr = x + r * kKeys;
            float* dxr = dx + r * kKeys;
            const Seen seen(p, sequence, i + r, key, padded);
            probabilities(xr, slope, seen, static_cast<int>(padded), lse[at_row + r]);
            if (s.threshold) keep.apply(r, keys, 1.0f / kept, dxr);
            score_gradients(xr, dxr, slope, padded, delta[at_row + r], whole);
            if (s.threshold) keep.apply(r, keys, 1.0f / kept, xr);
          }
          Tile<W>::template multiply<true, true>(keys, width, n, x, kKeys, dout, width, dv, width);
          Tile<W>::template multiply<true, true>(keys, width, n, dx, kKeys, q, width, dk, width);
          Tile<W>::template multiply<false, true>(n, width, keys, dx, kKeys, k, width, dq + at_row * width, width);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t to = ((sequence.batch * s.keys + row + j) * s.heads_k + unit.head_k) * D;
        narrow_row(dk + j * width, D, 1.0f, p.dk, p.dtype, to);
        narrow_row(dv + j * width, D, 1.0f, p.dv, p.dtype, to);
      }
    }
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = sequence.batch * s.queries + sequence.q_row + i;
        const int64_t to = (token * s.heads + unit.head_k * group + g) * D;
        const float* row = dq + (g * count + i) * width;
        if (p.dq_parts == nullptr)
          narrow_row(row, D, p.scale, p.dq, p.dtype, to);
        else
          narrow_row(row, D, p.scale, p.dq_parts + unit.part * s.tokens * s.heads * D + to);
      }
  }

  // lse, infinite where a row sees nothing so that its probabilities are 0; and delta = do . o - dlse, without do . o
  // where it comes from a whole tile.
  FASTFT_INLINE void gather_rows(const Sequence& sequence, int64_t head, bool whole, float* lse, float* delta) const {
    const AttentionShape& s = p.shape;
    float dout[kMostHeadSize], o[kMostHeadSize];
    for (int64_t i = 0; i < sequence.queries; ++i) {
      const int64_t row = sequence.q_row + i;
      const float value = p.lse[at(s.lse, sequence.batch, row, head)];
      lse[i] = value == -kInfinity ? kInfinity : value;
      float dot = p.dlse == nullptr ? 0.0f : -p.dlse[at(s.dlse, sequence.batch, row, head)];
      if (!whole) {
        const int64_t o_from = ((sequence.batch * s.queries + row) * s.heads + head) * s.head_size;
        widen_row(p.dout, p.dtype, at(s.dout, sequence.batch, row, head), s.head_size, 1.0f, dout);
        widen_row(p.o, p.dtype, o_from, s.head_size, 1.0f, o);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < s.head_size; ++d) sum += dout[d] * o[d];
        dot += sum;
      }
      delta[i] = dot;
    }
  }

  // Scores become probabilities, and slope the derivative of the soft-capped score.
  FASTFT_INLINE void probabilities(float* x, float* slope, const Seen& seen, int n, float lse) const {
    if (p.softcap != 0.0f) {
      const float cap = p.softcap, inverse = 1.0f / cap;
#pragma omp simd
      for (int j = 0; j < n; ++j) {
        const float t = tanh_of(x[j] * inverse);
        x[j] = cap * t;
        slope[j] = 1.0f - t * t;
      }
    }
    if (seen.all) {
#pragma omp simd
      for (int j = 0; j < n; ++j) x[j] = exp_of_negative(x[j] - lse);
    } else {
#pragma omp simd
      for (int j = 0; j < n; ++j) x[j] = (j >= seen.from) & (j < seen.to) ? exp_of_negative(x[j] - lse) : 0.0f;
    }
  }

  // Gradients of the probabilities become those of the scores.
  FASTFT_INLINE void score_gradients(const float* x, float* dx, const float* slope, int64_t cols, float delta,
                                     bool whole) const {
    if (whole) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cols; ++j) sum += x[j] * dx[j];
      delta += sum;
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) dx[j] = x[j] * (dx[j] - delta);
    if (p.softcap != 0.0f) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) dx[j] *= slope[j];
    }
  }
};

// In how many parts backward splits the keys of each sequence.
int64_t parts_of(const Problem& p) {
  constexpr int64_t kEnoughUnits = 64, kMostParts = 16, kKeysPerPart = 512;
  int64_t longest = 0;
  for (int64_t i = 0; i < p.shape.sequences; ++i) longest = std::max(longest, Sequence(p, i).keys);
  const int64_t units = std::max<int64_t>(1, p.shape.sequences * p.shape.heads_k);
  return std::max<int64_t>(1, std::min({kMostParts, kEnoughUnits / units, longest / kKeysPerPart}));
}

std::vector<Unit> backward_units(const Problem& p, int64_t parts) {
  std::vector<Unit> units;
  for (int64_t i = 0; i < p.shape.sequences; ++i) {
    const int64_t keys = Sequence(p, i).keys, blocks = (keys + kKeys - 1) / kKeys;
    const auto bound = [&](int64_t part) { return std::min(keys, blocks * part / parts * kKeys); };
    for (int64_t head = 0; head < p.shape.heads_k; ++head)
      for (int64_t part = 0; part < parts; ++part) units.push_back({i, head, part, bound(part), bound(part + 1)});
  }
  return units;
}

// dq = the sum of its parts, in their order.
template <class T>
struct AddParts {
  const float* from;
  T* to;
  int64_t parts, size;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      float sum = from[i];
      for (int64_t part = 1; part < parts; ++part) sum += from[part * size + i];
      narrow(sum, to[i]);
    }
  }
};

}  // namespace

void attention_backward(const AttentionShape* shape, const void* dout, const float* dlse, const void* q,
                        const void* k, const void* v, const void* o, const float* lse, const int32_t* cu_seqlens_q,
                        const int32_t* cu_seqlens_k, const int64_t* key_bounds, void* dq, void* dk, void* dv,
                        float scale, float softcap, uint64_t seed, DType dtype, int threads) {
  Problem p{*shape};
  p.q = q, p.k = k, p.v = v, p.o = o, p.lse = lse, p.dout = dout, p.dlse = dlse;
  p.dq = dq, p.dk = dk, p.dv = dv;
  p.cu_seqlens_q = cu_seqlens_q, p.cu_seqlens_k = cu_seqlens_k, p.key_bounds = key_bounds;
  p.scale = scale, p.softcap = softcap, p.seed = seed, p.dtype = dtype;
  const int64_t parts = parts_of(p), size = shape->tokens * shape->heads * shape->head_size;
  const std::unique_ptr<float[]> dq_parts(parts == 1 ? nullptr : new float[parts * size]);
  p.dq_parts = dq_parts.get();
  const std::vector<Unit> units = backward_units(p, parts);
  run_units(p, units, work_of(p), threads, in_pairs(p) ? backward_in_pairs() : runner<Backward>());
  if (parts == 1) return;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(size, parts * size, threads, AddParts<T>{dq_parts.get(), static_cast<T*>(dq), parts, size});
  });
}

}  // namespace fastft
