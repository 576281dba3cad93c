#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// cpu/adamw.h's adamw8bit and lion8bit for tensors on a GPU: one launch for all of them. rows: the same table, in GPU memory. first:
// [count + 1] in GPU memory, the number of 256-blocks before each tensor; blocks: their sum. scalars: in host memory.
// maps: in GPU memory, or null. Throws std::runtime_error, with CUDA's words, where the launch fails.
void cuda_adamw8bit(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, const float* scalars,
                    const float* maps, DType grad_dtype, DType copy_dtype, void* stream);
void cuda_lion8bit(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, const float* scalars,
                   const float* maps, DType grad_dtype, DType copy_dtype, void* stream);

// Number of CUDA devices; 0 where there is no driver.
int cuda_device_count();

}  // namespace fastft
