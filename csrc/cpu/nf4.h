#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// x: [numel] of `dtype`, finite; codes: [(numel + 1) / 2]; absmax: one float for each `block` elements, block even.
void nf4_quantize(const void* x, uint8_t* codes, float* absmax, int64_t numel, int64_t block, DType dtype, int threads);

// y: [numel] of `dtype`. absmax: floats, or 8-bit codes where map (256 floats) and nested are not null; see common/nf4.h.
void nf4_dequantize(const uint8_t* codes, const void* absmax, const float* map, const float* nested, float offset,
                    void* y, int64_t numel, int64_t block, DType dtype, int threads);

}  // namespace fastft
