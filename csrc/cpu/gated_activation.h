#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace fastft {

// All have `dtype`. Row strides are in elements, and the elements of a row are adjacent; y, dgate and dup are contiguous
// [rows, cols].
void gated_activation_forward(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* y,
                              int64_t rows, int64_t cols, Activation activation, DType dtype, int threads);

void gated_activation_backward(const void* dy, int64_t dy_stride, const void* gate, int64_t gate_stride,
                               const void* up, int64_t up_stride, void* dgate, void* dup, int64_t rows, int64_t cols,
                               Activation activation, DType dtype, int threads);

}  // namespace fastft
