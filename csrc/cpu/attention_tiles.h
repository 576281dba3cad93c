// What both passes of attention on the CPU are made of. Equations: kernels/fastft_kernels/reference/attention.py.
//
// Work is a tile of kRows queries of one head against kKeys keys, all in float and in the first two cache levels; no score
// matrix is in memory. A unit of work owns what it writes. How a call is cut into units depends on the problem alone, and so
// the results do not depend on the number of threads. Everything else is O(tokens).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/attention.h"

namespace fastft {

constexpr int kRows = 48, kKeys = 64;
constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications; below this, waking a thread costs more
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

// What one thread computes at a time. begin, end: queries, backward keys.
struct Unit {
  int64_t sequence, head_k, part, begin, end;
};

FASTFT_INLINE int64_t at(const int64_t* strides, int64_t batch, int64_t row, int64_t head) {
  return batch * strides[0] + row * strides[1] + head * strides[2];
}

// Elements of T, aligned as vectors are.
template <class T = float>
FASTFT_INLINE T* take(float*& scratch, int64_t count) {
  float* taken = scratch;
  scratch += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
  return reinterpret_cast<T*>(taken);
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
template <int kMostRows>
struct Keep {
  uint32_t bits[kKeys / 8][kMostRows];

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

// How a unit is computed, and in how many floats of memory.
struct Runner {
  void (*run)(const Problem& p, const Unit& unit, float* scratch);
  int64_t (*scratch_of)(const Problem& p, const Unit& unit);
};

template <template <int> class Body>
Runner runner() {
#ifdef FASTFT_X86
  if (vector_width() == 16) return {run_16<Body<16>>, Body<16>::scratch};
  if (vector_width() == 8) return {run_8<Body<8>>, Body<8>::scratch};
#endif
  return {run_4<Body<4>>, Body<4>::scratch};
}

// Runs all units, the threads taking the next one as they become free.
inline void run_units(const Problem& p, const std::vector<Unit>& units, int64_t work, int threads, Runner runner) {
  int64_t size = 0;
  for (const Unit& unit : units) size = std::max(size, runner.scratch_of(p, unit));
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, count, 1 + work / kWorkPerThread}));
#pragma omp parallel num_threads(static_cast<int>(parts)) if (parts > 1)
  {
    const std::unique_ptr<float[]> scratch(new float[size + 16]);
    float* aligned = scratch.get();
    while (reinterpret_cast<uintptr_t>(aligned) % 64) ++aligned;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < count; ++i) runner.run(p, units[i], aligned);
  }
}

// Multiplications of one product of a call, were all keys seen.
inline int64_t work_of(const Problem& p) {
  int64_t scores = 0;
  for (int64_t i = 0; i < p.shape.sequences; ++i) scores += Sequence(p, i).queries * Sequence(p, i).keys;
  return scores * p.shape.heads * p.shape.head_size;
}

}  // namespace fastft
