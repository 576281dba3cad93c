// Dropout of LoRA's input on the CPU. The equation is in kernels/fastft_kernels/reference/lora.py.
//
// The mask is drawn where it is applied, never stored: backward draws it again from the seed.
#include "cpu/lora.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/philox.h"

namespace fastft {
namespace {

constexpr int64_t kDraws = 8;     // 16-bit draws of one counter
constexpr int64_t kCounters = 16;  // counters side by side: one AVX-512 register of 32-bit words

FASTFT_INLINE float select(bool kept, float value) { return kept ? value : 0.0f; }

// As integers, which vectorise.
template <class Half>
FASTFT_INLINE Half select(bool kept, Half value) {
  return {static_cast<uint16_t>(kept ? value.bits : 0)};
}

template <class T>
struct ApplyMask {
  const T* x;
  T* y;
  int64_t elements;
  uint64_t seed;
  uint16_t threshold;

  FASTFT_INLINE void keep(const T* in, T* out, const uint16_t* draws, int64_t count) const {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = select(draws[i] >= threshold, in[i]);
  }

  // Over blocks of kCounters * kDraws elements.
  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      uint32_t words[kCounters * 4];
#pragma omp simd
      for (int64_t k = 0; k < kCounters; ++k) {
        const uint64_t counter = static_cast<uint64_t>(block * kCounters + k);
        const Words drawn = philox(seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0);
        words[4 * k] = drawn.w[0];
        words[4 * k + 1] = drawn.w[1];
        words[4 * k + 2] = drawn.w[2];
        words[4 * k + 3] = drawn.w[3];
      }
      uint16_t draws[kCounters * kDraws];  // on the little-endian machines this is built for, in the order of the words
      std::memcpy(draws, words, sizeof draws);
      const int64_t first = block * kCounters * kDraws;
      const T* in = x + first;
      T* out = y + first;
      if (elements - first >= kCounters * kDraws)
        keep(in, out, draws, kCounters * kDraws);
      else
        keep(in, out, draws, elements - first);
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
                              static_cast<uint16_t>(threshold)});
  });
}

}  // namespace fastft
