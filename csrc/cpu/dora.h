#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// y = gain * z + bias + gain_u * u, column by column. z, u, y: [rows, cols] of `dtype`, adjacent in a row; gain, gain_u:
// [cols], float; bias: [cols] of `bias_dtype`, or null; u and gain_u: null where there is no second term.
void dora_forward(const void* z, int64_t z_stride, const void* gain, const void* u, int64_t u_stride, const void* gain_u,
                  const void* bias, void* y, int64_t rows, int64_t cols, DType dtype, DType bias_dtype, int threads);

// dz = gain * dy; dgain[j] = the sum of dy * z over the rows, dbias[j] = that of dy, both float. z and dgain, and dbias:
// null where nobody asks.
void dora_backward(const void* dy, int64_t dy_stride, const void* z, int64_t z_stride, const void* gain, void* dz,
                   void* dgain, void* dbias, int64_t rows, int64_t cols, DType dtype, int threads);

}  // namespace fastft
