// 8-bit AdamW and Lion on the GPU: one launch for all tensors, the arithmetic of the CPU (common/adamw.h, common/quantize8.h).
//
// A warp updates a block of 256 elements, eight per lane, in registers; maxima travel by shuffles. 16 bytes are moved per
// element (Lion: 14), whole sectors at a time: lane l holds the elements l, l + 32, ... of the block.
#include "cuda/adamw8bit.h"

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/adamw.h"

namespace fastft {
namespace {

constexpr int kWarp = 32, kWarps = 4, kPerLane = kQuantBlock / kWarp;

__device__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Index of the tensor that block `number` belongs to: the last with first[index] <= number.
__device__ int64_t tensor_of(const int64_t* first, int64_t count, int64_t number) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first[middle] <= number)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Where a block lies: the row of its tensor, its number there, its first element and how many come from there on.
struct Place {
  const int64_t* row;
  int64_t block, from, left;

  __device__ Place(const int64_t* rows, int fields, const int64_t* first, int64_t count, int64_t number) {
    const int64_t tensor = tensor_of(first, count, number);
    row = rows + tensor * fields;
    block = number - first[tensor];
    from = block * kQuantBlock;
    left = row[0] - from;
  }

  // Address number `field` (1 ...), as elements of T; null where it is 0.
  template <class T>
  __device__ T* at(int field) const {
    return reinterpret_cast<T*>(row[field]);
  }
};

template <class G, class C, class Code>
__global__ void __launch_bounds__(kWarp * kWarps)
    adamw8bit_kernel(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, AdamWStep step,
                     Code code) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (number >= blocks) return;
  const int lane = threadIdx.x % kWarp;
  const Place place(rows, 8, first, count, number);
  const int64_t from = place.from, left = place.left;
  float* w = place.at<float>(1) + from;
  const G* g = place.at<const G>(2) + from;
  C* copy = place.at<C>(3);
  uint8_t* m_codes = place.at<uint8_t>(4) + from;
  float* m_absmax = place.at<float>(5) + place.block;
  uint8_t* v_codes = place.at<uint8_t>(6) + from;
  float* v_absmax = place.at<float>(7) + place.block;

  const float m_scale = *m_absmax, v_scale = *v_absmax;
  float m[kPerLane], roots[kPerLane], m_top = 0.0f, v_top = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int j = lane + k * kWarp;
    m[k] = roots[k] = 0.0f;
    if (j < left) {
      float v = code.read_unsigned(v_codes[j], v_scale);
      m[k] = code.read_signed(m_codes[j], m_scale);
      w[j] = guarded_adamw_element(w[j], widen(g[j]), m[k], v, roots[k], step);
      if (copy != nullptr) narrow(w[j], copy[from + j]);
      m_top = fmaxf(m_top, magnitude_of(m[k]));
      v_top = fmaxf(v_top, v);
    }
  }
  const float next_m = stored_absmax(warp_max(m_top)), next_v = stored_absmax(warp_max(v_top));
  const float m_inverse = reciprocal_or_zero(next_m), root_inverse = reciprocal_or_zero(std::sqrt(next_v));
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int j = lane + k * kWarp;
    if (j < left) {
      m_codes[j] = static_cast<uint8_t>(code.write_signed(m[k], m_inverse));
      v_codes[j] = static_cast<uint8_t>(code.write_root(roots[k], root_inverse));
    }
  }
  if (lane == 0) {
    *m_absmax = next_m;
    *v_absmax = next_v;
  }
}

// Twelve blocks leave 42 registers: full occupancy, at 32, spills one on sm_100.
template <class G, class C, class Code>
__global__ void __launch_bounds__(kWarp * kWarps, 12)
    lion8bit_kernel(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, AdamWStep step,
                    Code code) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (number >= blocks) return;
  const int lane = threadIdx.x % kWarp;
  const Place place(rows, 6, first, count, number);
  const int64_t from = place.from, left = place.left;
  float* w = place.at<float>(1) + from;
  const G* g = place.at<const G>(2) + from;
  C* copy = place.at<C>(3);
  uint8_t* codes = place.at<uint8_t>(4) + from;
  float* absmax = place.at<float>(5) + place.block;

  const float scale = *absmax;
  float m[kPerLane], top = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int j = lane + k * kWarp;
    m[k] = 0.0f;
    if (j < left) {
      m[k] = code.read_signed(codes[j], scale);
      w[j] = guarded_lion_element(w[j], widen(g[j]), m[k], step);
      if (copy != nullptr) narrow(w[j], copy[from + j]);
      top = fmaxf(top, magnitude_of(m[k]));
    }
  }
  const float next = stored_absmax(warp_max(top)), inverse = reciprocal_or_zero(next);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int j = lane + k * kWarp;
    if (j < left) codes[j] = static_cast<uint8_t>(code.write_signed(m[k], inverse));
  }
  if (lane == 0) *absmax = next;
}

// Calls launch(Type of the gradient, Type of the copy, step, code map), and throws CUDA's words where that fails.
template <class Launch>
void update(const char* name, const float* scalars, const float* maps, DType grad_dtype, DType copy_dtype,
            const Launch& launch) {
  AdamWStep step;
  std::memcpy(&step, scalars, sizeof step);
  with_type(grad_dtype, [&](auto grad) {
    with_type(copy_dtype, [&](auto copy) {
      if (maps == nullptr)
        launch(grad, copy, step, Companded{});
      else
        launch(grad, copy, step, Dynamic{maps, maps + 256});
    });
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

unsigned grid_of(int64_t blocks) { return static_cast<unsigned>((blocks + kWarps - 1) / kWarps); }

}  // namespace

void cuda_adamw8bit(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, const float* scalars,
                    const float* maps, DType grad_dtype, DType copy_dtype, void* stream) {
  if (blocks == 0) return;
  update("adamw8bit", scalars, maps, grad_dtype, copy_dtype, [&](auto grad, auto copy, AdamWStep step, auto code) {
    adamw8bit_kernel<typename decltype(grad)::type, typename decltype(copy)::type>
        <<<grid_of(blocks), kWarp * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(rows, first, count, blocks, step,
                                                                                    code);
  });
}

void cuda_lion8bit(const int64_t* rows, const int64_t* first, int64_t count, int64_t blocks, const float* scalars,
                   const float* maps, DType grad_dtype, DType copy_dtype, void* stream) {
  if (blocks == 0) return;
  update("lion8bit", scalars, maps, grad_dtype, copy_dtype, [&](auto grad, auto copy, AdamWStep step, auto code) {
    lion8bit_kernel<typename decltype(grad)::type, typename decltype(copy)::type>
        <<<grid_of(blocks), kWarp * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(rows, first, count, blocks, step,
                                                                                    code);
  });
}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace fastft
