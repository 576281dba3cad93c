#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// y[i] = x[i] where element i of the whole tensor is kept for `seed` (philox.h), else 0. x, y: [elements] of
// `dtype`, and may be the same memory. threshold: how many of the 65536 values of a draw drop the element.
void lora_apply_mask(const void* x, void* y, int64_t elements, uint64_t seed, int threshold, DType dtype, int threads);

}  // namespace fastft
