#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// Pointers may be null where noted; row strides are in elements, and the elements of a row are adjacent.
// x, residual, y, h, dy, dh, dx, dresidual have `dtype`; weight, bias and their gradients `weight_dtype`; mean and rstd
// are float [rows]. Dropout of x, with a threshold above 0: as in dropout.h.

// residual: null without one. bias: null for zeros. h: null where it is x. y, h: contiguous [rows, cols].
void layer_norm_forward(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                        const void* weight, const void* bias, void* y, void* h, float* mean, float* rstd, int64_t rows,
                        int64_t cols, float eps, int64_t threshold, float scale, int64_t seed, DType dtype,
                        DType weight_dtype, int threads);

// dh: null when nothing depends on h. dresidual: the gradient of h; null when it is not asked for. dweight, dbias: null
// when they are not asked for. dx, dresidual: contiguous [rows, cols].
void layer_norm_backward(const void* dy, int64_t dy_stride, const void* dh, int64_t dh_stride, const void* h,
                         int64_t h_stride, const void* weight, const float* mean, const float* rstd, void* dx,
                         void* dresidual, void* dweight, void* dbias, int64_t rows, int64_t cols, int64_t threshold,
                         float scale, int64_t seed, DType dtype, DType weight_dtype, int threads);

}  // namespace fastft
