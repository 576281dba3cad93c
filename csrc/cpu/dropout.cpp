// Dropout on the CPU. The equation is in kernels/fastft_kernels/reference/dropout.py, the draws in reference/_philox.py.
#include "cpu/dropout.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/philox.h"

namespace fastft {
namespace {

// Works on blocks of kBlock elements: their draws stay in the first level cache.
template <class T>
struct Dropout {
  static constexpr int64_t kCounters = 128, kBlock = kCounters * kDrawsPerCounter;

  const T* x;
  T* y;
  int64_t elements;
  uint32_t threshold;
  float scale;
  uint64_t seed;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    alignas(64) uint32_t words[4 * kCounters];
    for (int64_t block = begin; block < end; ++block) {
      draw_words(seed, static_cast<uint64_t>(block * kCounters), kCounters, words);
      const int64_t n = std::min(kBlock, elements - block * kBlock);
      const T* in = x + block * kBlock;
      T* out = y + block * kBlock;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float kept = widen(in[j]) * scale;
        narrow(draw_of(words, j) >= threshold ? kept : 0.0f, out[j]);
      }
    }
  }
};

}  // namespace

void dropout(const void* x, void* y, int64_t elements, int64_t threshold, float scale, int64_t seed, DType dtype,
             int threads) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Body = Dropout<T>;
    const int64_t blocks = (elements + Body::kBlock - 1) / Body::kBlock;
    parallel_for(blocks, elements, threads,
                 Body{static_cast<const T*>(x), static_cast<T*>(y), elements, static_cast<uint32_t>(threshold), scale,
                      static_cast<uint64_t>(seed)});
  });
}

}  // namespace fastft
