#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// cpu/nf4.h's nf4_dequantize for tensors on a GPU, y included; block is a power of two, at least 32. Throws
// std::runtime_error, with CUDA's words, where the launch fails.
void cuda_nf4_dequantize(const uint8_t* codes, const void* absmax, const float* map, const float* nested, float offset,
                         void* y, int64_t numel, int64_t block, DType dtype, void* stream);

}  // namespace fastft
