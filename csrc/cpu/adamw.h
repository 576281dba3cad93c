#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// One step for `count` tensors in one pass. `rows`: a row of integers for each tensor, its size and then addresses:
//
//     adamw         numel, weight, gradient, copy, m, v
//     adamw8bit     numel, weight, gradient, copy, m codes, m absmax, v codes, v absmax
//     lion8bit      numel, weight, gradient, copy, m codes, m absmax
//
// weight, m, v, absmax: float. gradient: of grad_dtype; null, for adamw only, where it is zero. copy: the weight rounded to
// copy_dtype is written there; null where the weight itself is the parameter. Codes: whole blocks of 256
// (common/quantize8.h). Tensors are contiguous, at any address that suits their elements. scalars: the nine of AdamWStep
// (common/adamw.h). maps: 512 floats, signed and unsigned, or null for Companded.
void adamw(const int64_t* rows, int64_t count, const float* scalars, DType grad_dtype, DType copy_dtype, int threads);
void adamw8bit(const int64_t* rows, int64_t count, const float* scalars, const float* maps, DType grad_dtype,
               DType copy_dtype, int threads);
void lion8bit(const int64_t* rows, int64_t count, const float* scalars, const float* maps, DType grad_dtype,
              DType copy_dtype, int threads);

// Codes of `numel` floats, and back. v is not negative where `is_signed` is 0.
void quantize8(const float* x, uint8_t* codes, float* absmax, int64_t numel, int is_signed, const float* maps,
               int threads);
void dequantize8(const uint8_t* codes, const float* absmax, float* x, int64_t numel, int is_signed, const float* maps,
                 int threads);

// The sum of squares of all elements, in double. rows: numel, address.
void square_sum(const int64_t* rows, int64_t count, double* sum, DType dtype, int threads);

}  // namespace fastft
