#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastft {

// The shape of a call, filled by kernels/fastft_kernels/cpp/attention.py as a row of 64-bit integers in this order.
// Strides are in elements, from one batch element, row and head to the next; the elements of a head are adjacent.
struct AttentionShape {
  int64_t sequences, heads, heads_k, head_size, queries, keys;  // queries, keys: of each sequence, unless packed
  int64_t tokens;                                               // rows of q in all
  int64_t left, right, threshold;                               // threshold: of 65536, a draw below it is dropped
  int64_t q[3], k[3], v[3], lse[3], dout[3], dlse[3];           // dout, dlse: backward only
};

// cu_seqlens: both null unless packed. key_bounds: first and end of the keys of each sequence, or null.
// q, k, v, o, dout, dq, dk, dv have `dtype`; o, dq, dk, dv are contiguous. softcap: 0 for none.
void attention_forward(const AttentionShape* shape, const void* q, const void* k, const void* v,
                       const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, const int64_t* key_bounds, void* o,
                       float* lse, float scale, float softcap, uint64_t seed, DType dtype, int threads);

// dlse: null when nothing depends on lse.
void attention_backward(const AttentionShape* shape, const void* dout, const float* dlse, const void* q,
                        const void* k, const void* v, const void* o, const float* lse, const int32_t* cu_seqlens_q,
                        const int32_t* cu_seqlens_k, const int64_t* key_bounds, void* dq, void* dk, void* dv,
                        float scale, float softcap, uint64_t seed, DType dtype, int threads);

}  // namespace fastft
