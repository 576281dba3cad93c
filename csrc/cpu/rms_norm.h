#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// Pointers may be null where noted; row strides are in elements, and the elements of a row are adjacent.
// x, residual, y, h, dy, dh, dx have `dtype`; weight and dweight have `weight_dtype`; rstd is float.

// h and residual: both null without a residual. y, h: contiguous [rows, cols]. rstd: [rows].
void rms_norm_forward(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                      const void* weight, void* y, void* h, float* rstd, int64_t rows, int64_t cols, float eps,
                      float offset, DType dtype, DType weight_dtype, int threads);

// dh: null when nothing depends on h. dweight: null when it is not asked for. dx: contiguous [rows, cols].
void rms_norm_backward(const void* dy, int64_t dy_stride, const void* dh, int64_t dh_stride, const void* h,
                       int64_t h_stride, const void* weight, const float* rstd, void* dx, void* dweight, int64_t rows,
                       int64_t cols, float offset, DType dtype, DType weight_dtype, int threads);

}  // namespace fastft
