// Reading weights in 4 bits on the GPU, with the arithmetic of the CPU (common/nf4.h).
//
// A thread reads four bytes of codes and writes eight values, which lie in one block: whole sectors for a warp. The 16
// values lie in shared memory in 16 banks, so that lanes with different codes do not wait for each other.
#include "cuda/nf4.h"

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/nf4.h"

namespace fastft {
namespace {

constexpr int kThreads = 256, kPerThread = 8;

template <class T>
struct alignas(sizeof(T) == 4 ? 16 : kPerThread * sizeof(T)) Vector {
  T at[sizeof(T) == 4 ? 4 : kPerThread];
};

// WHOLE: codes and y are aligned for wide accesses.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(const uint8_t* codes, NF4Scales scales, T* y, int64_t numel, int shift) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = nf4_value(threadIdx.x);
  __syncthreads();
  const int64_t from = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (from >= numel) return;
  const float absmax = scales.at(from >> shift);
  const uint8_t* in = codes + from / 2;
  T* out = y + from;
  if (WHOLE && from + kPerThread <= numel) {
    uint32_t packed;
    std::memcpy(&packed, __builtin_assume_aligned(in, 4), sizeof packed);
    constexpr int kVector = sizeof(Vector<T>) / sizeof(T);
    Vector<T> values[kPerThread / kVector];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int nibble = k / 2 * 8 + (k % 2 ? 0 : 4);
      narrow(table[packed >> nibble & 15] * absmax, values[k / kVector].at[k % kVector]);
    }
#pragma unroll
    for (int v = 0; v < kPerThread / kVector; ++v) reinterpret_cast<Vector<T>*>(out)[v] = values[v];
  } else {
    for (int64_t k = 0; k < kPerThread && from + k < numel; ++k)
      narrow(table[k % 2 ? in[k / 2] & 15 : in[k / 2] >> 4] * absmax, out[k]);
  }
}

}  // namespace

void cuda_nf4_dequantize(const uint8_t* codes, const void* absmax, const float* map, const float* nested, float offset,
                         void* y, int64_t numel, int64_t block, DType dtype, void* stream) {
  if (numel == 0) return;
  int shift = 0;
  while (int64_t{1} << shift < block) ++shift;
  const NF4Scales scales{absmax, map, nested, offset};
  const unsigned grid = static_cast<unsigned>((numel + kThreads * kPerThread - 1) / (kThreads * kPerThread));
  const bool whole = reinterpret_cast<uintptr_t>(codes) % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = whole ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, scales, static_cast<T*>(y), numel, shift);
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("nf4_dequantize: ") + cudaGetErrorString(error));
}

}  // namespace fastft
