#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// x, y: contiguous, `elements` of `dtype`. An element is kept, and multiplied by `scale`, iff its draw is at least
// `threshold`. The gradient is the same function of the gradient.
void dropout(const void* x, void* y, int64_t elements, int64_t threshold, float scale, int64_t seed, DType dtype,
             int threads);

}  // namespace fastft
