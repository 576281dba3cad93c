// Attention on the CPU, without a score matrix in memory. Equations: kernels/fastft_kernels/reference/attention.py.
//
// Work is a tile of kRows queries of one head against kKeys keys, all in float and in the first two cache levels. A
// unit of work owns what it writes: forward some queries of all heads that share a key head, backward the keys of one
// head of a sequence. Where that makes few units, backward splits the keys and adds up the parts of dq. How depends on
// the problem alone, and so the results do not depend on the number of threads. Everything else is O(tokens).
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common/elementary.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/tile.h"

namespace fastft {
namespace {

constexpr int kRows = 48, kKeys = 64, kMostHeadSize = 256;
constexpr int64_t kRowsPerUnit = 384;          // forward: enough to pay for widening and transposing the keys
constexpr int64_t kWorkPerThread = 1 << 18;    // multiplications; below this, waking a thread costs more
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Everything about a call.
struct Problem {
  const AttentionShape& shape;
  const void *q, *k, *v, *o, *dout;
  const float *lse, *dlse;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  const int64_t* key_bounds;
  void *out, *dq, *dk, *dv;
  float *lse_out, *dq_parts;  // dq_parts: [parts, like q], null where no keys are split
  float scale, softcap;
  uint64_t seed;
  DType dtype;

  int64_t group() const { return shape.heads / shape.heads_k; }
};

// One sequence: where it starts in each tensor, and which keys its query i sees: those of first ... end - 1 that are in
// i + offset - left ... i + offset + right.
struct Sequence {
  int64_t batch, q_row, k_row, queries, keys, offset, first, end;
  uint32_t random_row, random_head;

  Sequence(const Problem& p, int64_t i) {
    const AttentionShape& s = p.shape;
    if (p.cu_seqlens_q != nullptr) {
      batch = 0, q_row = p.cu_seqlens_q[i], k_row = p.cu_seqlens_k[i];
      queries = p.cu_seqlens_q[i + 1] - q_row, keys = p.cu_seqlens_k[i + 1] - k_row;
    } else {
      batch = i, q_row = k_row = 0, queries = s.queries, keys = s.keys;
    }
    offset = keys - queries;
    first = p.key_bounds != nullptr ? p.key_bounds[2 * i] : 0;
    end = p.key_bounds != nullptr ? p.key_bounds[2 * i + 1] : keys;
    random_row = static_cast<uint32_t>(q_row);
    random_head = static_cast<uint32_t>(batch * s.heads);
  }

  FASTFT_INLINE int64_t low(int64_t query, int64_t left) const { return std::max(first, query + offset - left); }
  FASTFT_INLINE int64_t high(int64_t query, int64_t right) const { return std::min(end, query + offset + right + 1); }
};

// Which of the `cols` scores of a row of a tile are seen: from ... to - 1.
struct Seen {
  int from, to;
  bool all;

  FASTFT_INLINE Seen(const Problem& p, const Sequence& sequence, int64_t query, int64_t key, int64_t cols) {
    from = static_cast<int>(std::max<int64_t>(sequence.low(query, p.shape.left) - key, 0));
    to = static_cast<int>(std::min<int64_t>(sequence.high(query, p.shape.right) - key, cols));
    all = from == 0 && to == cols;
  }
};

// exp(x) for x <= 0; below -87 it stays at 1e-38, which is nothing beside the largest of a softmax, 1.
FASTFT_INLINE float exp_below(float x) {
  constexpr float kShift = 12582912.0f;
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.3981999507e-3f + r * 1.9875691500e-4f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) - bits_of(kShift) + 127u) << 23);
}

struct Unit {
  int64_t sequence, head_k, part, begin, end;  // begin, end: queries, backward keys
};

FASTFT_INLINE int64_t at(const int64_t* strides, int64_t batch, int64_t row, int64_t head) {
  return batch * strides[0] + row * strides[1] + head * strides[2];
}

FASTFT_INLINE float* take(float*& scratch, int64_t count) {
  float* taken = scratch;
  scratch += (count + 15) / 16 * 16;
  return taken;
}

// Rows of `from`, which start at `offset`, widened and scaled, as rows of `width` floats: zeros behind each, and where not
// in begin ... end - 1.
FASTFT_INLINE void widen_rows(const Problem& p, const void* from, int64_t offset, int64_t stride, int64_t rows,
                              int64_t width, float scale, float* to, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < rows; ++i) {
    float* out = to + i * width;
    const int64_t n = i >= begin && i < end ? p.shape.head_size : 0;
    widen_row(from, p.dtype, offset + i * stride, n, scale, out);
    for (int64_t j = n; j < width; ++j) out[j] = 0.0f;
  }
}

// What dropout keeps of a tile: bit b of bits[c][r] is for row r and key 8 c + b.
struct Keep {
  uint32_t bits[kKeys / 8][kRows];

  FASTFT_INLINE void draw(const Problem& p, uint32_t row, int64_t rows, int64_t key, int64_t keys, uint32_t head) {
    const uint32_t threshold = static_cast<uint32_t>(p.shape.threshold);
    const uint64_t seed = p.seed;
    const int padded = static_cast<int>((rows + 15) / 16 * 16);  // whole vectors: a remainder would be drawn one by one
    for (int64_t c = 0; c < (keys + 7) / 8; ++c) {
      const uint32_t counter = static_cast<uint32_t>(key / 8 + c);
      uint32_t* to = bits[c];
#pragma omp simd
      for (int r = 0; r < padded; ++r) {
        const Words words = philox(seed, counter, row + static_cast<uint32_t>(r), head, 1);
        uint32_t kept = 0;
        for (int i = 0; i < 4; ++i) {
          kept |= static_cast<uint32_t>((words.w[i] & 0xffffu) >= threshold) << (2 * i);
          kept |= static_cast<uint32_t>((words.w[i] >> 16) >= threshold) << (2 * i + 1);
        }
        to[r] = kept;
      }
    }
  }

  // x[j] *= factor where kept, else 0
  FASTFT_INLINE void apply(int64_t r, int64_t keys, float factor, float* x) const {
    for (int64_t c = 0; c < (keys + 7) / 8; ++c) {
      const uint32_t kept = bits[c][r];
#pragma omp simd
      for (uint32_t b = 0; b < 8; ++b) x[8 * c + b] = (kept >> b) & 1u ? x[8 * c + b] * factor : 0.0f;
    }
  }
};

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
    Keep keep;

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
      for (int j = 0; j < cols; ++j) sum += x[j] = exp_below(x[j] - pivot);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < cols; ++j) sum += x[j] = (j >= seen.from) & (j < seen.to) ? exp_below(x[j] - pivot) : 0.0f;
    }
    return sum;
  }
};

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
    Keep keep;

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
      for (int j = 0; j < n; ++j) x[j] = exp_below(x[j] - lse);
    } else {
#pragma omp simd
      for (int j = 0; j < n; ++j) x[j] = (j >= seen.from) & (j < seen.to) ? exp_below(x[j] - lse) : 0.0f;
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

template <class Body>
FASTFT_CONTRACTED void run_4(const Problem& p, const Unit& unit, float* scratch) {
  Body{p}(unit, scratch);
}

#ifdef FASTFT_X86
template <class Body>
FASTFT_AVX2 void run_8(const Problem& p, const Unit& unit, float* scratch) {
  Body{p}(unit, scratch);
}

template <class Body>
FASTFT_AVX512 void run_16(const Problem& p, const Unit& unit, float* scratch) {
  Body{p}(unit, scratch);
}
#endif

// Runs all units, the threads taking the next one as they become free.
template <template <int> class Body>
void run_units(const Problem& p, const std::vector<Unit>& units, int64_t work, int threads) {
  auto run = run_4<Body<4>>;
  auto scratch_of = Body<4>::scratch;
#ifdef FASTFT_X86
  if (vector_width() == 8) run = run_8<Body<8>>, scratch_of = Body<8>::scratch;
  if (vector_width() == 16) run = run_16<Body<16>>, scratch_of = Body<16>::scratch;
#endif
  int64_t size = 0;
  for (const Unit& unit : units) size = std::max(size, scratch_of(p, unit));
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, count, 1 + work / kWorkPerThread}));
#pragma omp parallel num_threads(static_cast<int>(parts)) if (parts > 1)
  {
    const std::unique_ptr<float[]> scratch(new float[size + 16]);
    float* aligned = scratch.get();
    while (reinterpret_cast<uintptr_t>(aligned) % 64) ++aligned;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < count; ++i) run(p, units[i], aligned);
  }
}

// Multiplications of one product of a call, were all keys seen.
int64_t work_of(const Problem& p) {
  int64_t scores = 0;
  for (int64_t i = 0; i < p.shape.sequences; ++i) scores += Sequence(p, i).queries * Sequence(p, i).keys;
  return scores * p.shape.heads * p.shape.head_size;
}

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

void attention_forward(const AttentionShape* shape, const void* q, const void* k, const void* v,
                       const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, const int64_t* key_bounds, void* o,
                       float* lse, float scale, float softcap, uint64_t seed, DType dtype, int threads) {
  Problem p{*shape};
  p.q = q, p.k = k, p.v = v, p.out = o, p.lse_out = lse;
  p.cu_seqlens_q = cu_seqlens_q, p.cu_seqlens_k = cu_seqlens_k, p.key_bounds = key_bounds;
  p.scale = scale, p.softcap = softcap, p.seed = seed, p.dtype = dtype;
  const std::vector<Unit> units = forward_units(p);
  run_units<Forward>(p, units, work_of(p), threads);
}

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
  run_units<Backward>(p, units, work_of(p), threads);
  if (parts == 1) return;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(size, parts * size, threads, AddParts<T>{dq_parts.get(), static_cast<T*>(dq), parts, size});
  });
}

}  // namespace fastft
