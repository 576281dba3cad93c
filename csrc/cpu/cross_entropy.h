#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// logits: [rows, cols] of `dtype`, adjacent elements in a row, row stride in elements; with needs_gradient they become
// their gradient. scale: float [rows], or null for 1. softcap: 0 for none. loss, log_prob, entropy: float [rows];
// correct: bytes [rows], 0 or 1.
void cross_entropy_forward(void* logits, int64_t stride, const int64_t* labels, const float* scale, float* loss,
                           float* log_prob, uint8_t* correct, float* entropy, int64_t rows, int64_t cols,
                           int64_t ignore_index, float label_smoothing, float softcap, float z_loss,
                           bool needs_gradient, DType dtype, int threads);

}  // namespace fastft
