// Philox4x32-10: random words from a counter and a key, without state (Salmon et al., 2011, doi:10.1145/2063384.2063405).
//
// Dropout's mask is a function of the seed and the element, so that backward draws it again and every backend draws the
// same one: kernels/fastft_kernels/reference/_philox.py states which element gets which bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace fastft {

struct Words {
  uint32_t w[4];
};

FASTFT_INLINE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    // High and low half apart, which vectorises best.
    const uint32_t high0 = static_cast<uint32_t>((uint64_t{0xD2511F53u} * c0) >> 32), low0 = 0xD2511F53u * c0;
    const uint32_t high2 = static_cast<uint32_t>((uint64_t{0xCD9E8D57u} * c2) >> 32), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr int64_t kDrawsPerCounter = 8;

// The words of `count` counters from `first` on, as dropout of x numbers them: words[4 * i ...] are those of first + i.
// Everything is 32 bits wide, else only half of a vector would be used.
FASTFT_INLINE void draw_words(uint64_t seed, uint64_t first, int64_t count, uint32_t* words) {
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  const int n = static_cast<int>(count);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t c0 = low + static_cast<uint32_t>(i);
    const Words drawn = philox(seed, c0, c0 < low ? high + 1u : high, 0u, 0u);
    words[4 * i] = drawn.w[0];
    words[4 * i + 1] = drawn.w[1];
    words[4 * i + 2] = drawn.w[2];
    words[4 * i + 3] = drawn.w[3];
  }
}

// The draw of element j of those that the words stand for: the low half of each word comes first in memory.
FASTFT_INLINE uint32_t draw_of(const uint32_t* words, int64_t j) {
  uint16_t draw;
  std::memcpy(&draw, reinterpret_cast<const char*>(words) + 2 * j, sizeof draw);
  return draw;
}

}  // namespace fastft
