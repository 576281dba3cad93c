// Philox4x32-10: random words from a counter and a key, without state (Salmon et al., 2011, doi:10.1145/2063384.2063405).
//
// Dropout's mask is a function of the seed and the element, so that backward draws it again and every backend draws the
// same one: kernels/fastft_kernels/reference/_philox.py states which element gets which bits.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastft {

struct Words {
  uint32_t w[4];
};

FASTFT_INLINE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastft
