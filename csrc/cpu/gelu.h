#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace fastft {

// x, y, dy and dx have `dtype`, bias and dbias `bias_dtype`. Row strides are in elements, and the elements of a row are
// adjacent; y and dx are contiguous [rows, cols]. bias: null for none.
void gelu_forward(const void* x, int64_t x_stride, const void* bias, void* y, int64_t rows, int64_t cols,
                  Activation activation, DType dtype, DType bias_dtype, int threads);

// dbias: null when it is not asked for.
void gelu_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* bias, void* dx,
                   void* dbias, int64_t rows, int64_t cols, Activation activation, DType dtype, DType bias_dtype,
                   int threads);

}  // namespace fastft
