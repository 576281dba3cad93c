#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// The shape of a call, filled by kernels/fastft_kernels/cpp/rope.py as a row of 64-bit integers in this order. Strides are
// in elements, from one batch element, token and head to the next; elements of a head and of an angle row are adjacent.
struct RopeShape {
  int64_t batch, tokens, heads_q, heads_k, head_size, half;  // half: the turned elements of a head, in pairs
  int64_t q[3], k[3], q_out[3], k_out[3], cos[2], sin[2];
};

// q, k, q_out and k_out have `dtype`, cos and sin `angle_dtype`. inverse: the transposed rotation, which is backward's.
void rope(const RopeShape* shape, const void* q, const void* k, const void* cos, const void* sin, void* q_out,
          void* k_out, bool inverse, DType dtype, DType angle_dtype, int threads);

}  // namespace fastft
