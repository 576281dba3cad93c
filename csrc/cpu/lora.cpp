// Dropout of LoRA's input on the CPU. The equation is in kernels/fastft_kernels/reference/lora.py.
//
// The mask is drawn where it is applied, never stored: backward draws it again from the seed.
#include "cpu/lora.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/philox.h"

namespace fastft {
namespace {

constexpr int64_t kDraws = 8;     // 16-bit draws of one counter
constexpr int64_t kCounters = 16;  // counters side by side: one AVX-512 register of 32-bit words

template <class T>
struct ApplyMask {
  const T* x;
  T* y;
  int64_t elements;
  uint64_t seed;
  uint32_t threshold;

  // Over blocks of kCounters * kDraws elements.
  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      uint32_t words[4][kCounters];
#pragma omp simd
      for (int64_t k = 0; k < kCounters; ++k) {
        const uint64_t counter = static_cast<uint64_t>(block * kCounters + k);
        const Words drawn = philox(seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0);
        words[0][k] = drawn.w[0];
        words[1][k] = drawn.w[1];
        words[2][k] = drawn.w[2];
        words[3][k] = drawn.w[3];
      }
      uint16_t draws[kCounters * kDraws];
      for (int64_t k = 0; k < kCounters; ++k) {
        for (int64_t word = 0; word < 4; ++word) {
          draws[k * kDraws + 2 * word] = static_cast<uint16_t>(words[word][k]);
          draws[k * kDraws + 2 * word + 1] = static_cast<uint16_t>(words[word][k] >> 16);
        }
      }
      const int64_t first = block * kCounters * kDraws;
      const int64_t count = std::min(kCounters * kDraws, elements - first);
      const T* in = x + first;
      T* out = y + first;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = draws[i] >= threshold ? in[i] : T{};
    }
  }
};

}  // namespace

void lora_apply_mask(const void* x, void* y, int64_t elements, uint64_t seed, int threshold, DType dtype, int threads) {
  const int64_t blocks = (elements + kCounters * kDraws - 1) / (kCounters * kDraws);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(blocks, elements, threads,
                 ApplyMask<T>{static_cast<const T*>(x), static_cast<T*>(y), elements, seed,
                              static_cast<uint32_t>(threshold)});
  });
}

}  // namespace fastft
