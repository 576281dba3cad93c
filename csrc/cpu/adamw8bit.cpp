// AdamW and Lion with moments in 8 bits: a block of 256 is read, updated and written back while it lies in the first level
// cache; nothing else is allocated.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/adamw.h"
#include "common/parallel.h"
#include "common/tensor_list.h"
#include "cpu/adamw.h"

namespace fastft {
namespace {

FASTFT_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

// The largest magnitude. Floats that are not negative are ordered like their bits, and NaN is above them all.
FASTFT_INLINE float largest(const float* x, int size) {
  uint32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int j = 0; j < size; ++j) top = larger(top, bits_of(x[j]) & 0x7fffffffu);
  return float_of(top);
}

// Bytes are widened and narrowed in loops of their own: next to floats they would make the compiler use the registers a
// quarter full.
template <class Byte>
FASTFT_INLINE void widen_codes(const uint8_t* codes, int size, int32_t* wide) {
#pragma omp simd
  for (int j = 0; j < size; ++j) wide[j] = static_cast<Byte>(codes[j]);
}

FASTFT_INLINE void narrow_codes(const int32_t* wide, int size, uint8_t* codes) {
#pragma omp simd
  for (int j = 0; j < size; ++j) codes[j] = static_cast<uint8_t>(wide[j]);
}

template <class Code>
FASTFT_INLINE void write_signed(const Code& code, const float* x, float top, int size, uint8_t* codes, float* absmax) {
  *absmax = stored_absmax(top);
  const float scale = reciprocal_or_zero(*absmax);
  alignas(64) int32_t wide[kQuantBlock];
#pragma omp simd
  for (int j = 0; j < size; ++j) wide[j] = code.write_signed(x[j], scale);
  narrow_codes(wide, size, codes);
}

template <class Code>
FASTFT_INLINE void write_roots(const Code& code, const float* roots, float top, int size, uint8_t* codes,
                               float* absmax) {
  *absmax = stored_absmax(top);
  const float scale = reciprocal_or_zero(std::sqrt(*absmax));
  alignas(64) int32_t wide[kQuantBlock];
#pragma omp simd
  for (int j = 0; j < size; ++j) wide[j] = code.write_root(roots[j], scale);
  narrow_codes(wide, size, codes);
}

// The gradient as floats: where it lies, or widened into `scratch`.
FASTFT_INLINE const float* floats(const void* from, DType dtype, int64_t offset, int size, float* scratch) {
  if (dtype == DType::float32) return static_cast<const float*>(from) + offset;
  widen_row(from, dtype, offset, size, 1.0f, scratch);
  return scratch;
}

// Calls body.block(piece, offset in the tensor, size) for each block of the pieces; the size of a whole block is a constant.
template <int kFields, class Body>
struct ForBlocks {
  const TensorList<kFields>& tensors;
  Body body;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t number = begin; number < end; ++number) {
      const auto piece = tensors.piece(number);
      int64_t j = 0;
      for (; j + kQuantBlock <= piece.size; j += kQuantBlock) body.block(piece, piece.begin + j, kQuantBlock);
      if (j < piece.size) body.block(piece, piece.begin + j, static_cast<int>(piece.size - j));
    }
  }
};

// Nearly every block has only good numbers, so it is computed without asking, beside the old one; where the largest second
// moment says otherwise it is computed again, element by element.
template <class Code>
struct AdamW8bit {
  AdamWStep step;
  Code code;
  DType grad_dtype, copy_dtype;

  FASTFT_INLINE void block(const TensorList<8>::Piece& piece, int64_t from, int size) const {
    float* w = piece.at<float>(1) + from;
    uint8_t* m_codes = piece.at<uint8_t>(4) + from;
    float* m_absmax = piece.at<float>(5) + from / kQuantBlock;
    uint8_t* v_codes = piece.at<uint8_t>(6) + from;
    float* v_absmax = piece.at<float>(7) + from / kQuantBlock;
    alignas(64) float scratch[kQuantBlock], m[kQuantBlock], roots[kQuantBlock], next_w[kQuantBlock];
    alignas(64) int32_t m_wide[kQuantBlock], v_wide[kQuantBlock];
    const float* g = floats(piece.at<void>(2), grad_dtype, from, size, scratch);
    widen_codes<typename Code::Signed>(m_codes, size, m_wide);
    widen_codes<uint8_t>(v_codes, size, v_wide);
    const AdamWStep s = step;
    const Code c = code;
    const float m_scale = *m_absmax, v_scale = *v_absmax;
    uint32_t m_bits = 0, v_bits = 0;
#pragma omp simd reduction(max : m_bits, v_bits)
    for (int j = 0; j < size; ++j) {
      float next_m = c.read_widened(m_wide[j], m_scale), next_v = c.read_unsigned(v_wide[j], v_scale);
      next_w[j] = adamw_element(w[j], g[j], next_m, next_v, roots[j], s);
      m[j] = next_m;
      m_bits = larger(m_bits, bits_of(next_m) & 0x7fffffffu);
      v_bits = larger(v_bits, bits_of(next_v));
    }
    float m_top = float_of(m_bits), v_top = float_of(v_bits);
    if (v_top < kLargestMoment && s.eps > 0.0f) {
#pragma omp simd
      for (int j = 0; j < size; ++j) w[j] = next_w[j];
    } else {
      v_top = 0.0f;
      for (int j = 0; j < size; ++j) {
        float next_m = c.read_widened(m_wide[j], m_scale), next_v = c.read_unsigned(v_wide[j], v_scale);
        w[j] = guarded_adamw_element(w[j], g[j], next_m, next_v, roots[j], s);
        m[j] = next_m;
        v_top = std::max(v_top, next_v);
      }
      m_top = largest(m, size);
    }
    if (void* copy = piece.at<void>(3)) narrow_row(w, size, 1.0f, copy, copy_dtype, from);
    write_signed(c, m, m_top, size, m_codes, m_absmax);
    write_roots(c, roots, v_top, size, v_codes, v_absmax);
  }
};

template <class Code>
struct Lion8bit {
  AdamWStep step;
  Code code;
  DType grad_dtype, copy_dtype;

  FASTFT_INLINE void block(const TensorList<6>::Piece& piece, int64_t from, int size) const {
    float* w = piece.at<float>(1) + from;
    uint8_t* codes = piece.at<uint8_t>(4) + from;
    float* absmax = piece.at<float>(5) + from / kQuantBlock;
    alignas(64) float scratch[kQuantBlock], m[kQuantBlock];
    alignas(64) int32_t wide[kQuantBlock];
    const float* g = floats(piece.at<void>(2), grad_dtype, from, size, scratch);
    widen_codes<typename Code::Signed>(codes, size, wide);
    const AdamWStep s = step;
    const Code c = code;
    const float scale = *absmax;
#pragma omp simd
    for (int j = 0; j < size; ++j) {
      float next_m = c.read_widened(wide[j], scale);
      w[j] = guarded_lion_element(w[j], g[j], next_m, s);
      m[j] = next_m;
    }
    if (void* copy = piece.at<void>(3)) narrow_row(w, size, 1.0f, copy, copy_dtype, from);
    write_signed(c, m, largest(m, size), size, codes, absmax);
  }
};

template <class Code, bool Signed>
struct Quantize {
  Code code;

  FASTFT_INLINE void block(const TensorList<4>::Piece& piece, int64_t from, int size) const {
    const float* x = piece.at<float>(1) + from;
    uint8_t* codes = piece.at<uint8_t>(2) + from;
    float* absmax = piece.at<float>(3) + from / kQuantBlock;
    const Code c = code;
    if (Signed) return write_signed(c, x, largest(x, size), size, codes, absmax);
    alignas(64) float roots[kQuantBlock];
#pragma omp simd
    for (int j = 0; j < size; ++j) roots[j] = std::sqrt(x[j]);
    write_roots(c, roots, largest(x, size), size, codes, absmax);
  }
};

template <class Code, bool Signed>
struct Dequantize {
  Code code;

  FASTFT_INLINE void block(const TensorList<4>::Piece& piece, int64_t from, int size) const {
    float* x = piece.at<float>(1) + from;
    const uint8_t* codes = piece.at<uint8_t>(2) + from;
    const float absmax = piece.at<float>(3)[from / kQuantBlock];
    const Code c = code;
    alignas(64) int32_t wide[kQuantBlock];
    widen_codes<std::conditional_t<Signed, typename Code::Signed, uint8_t>>(codes, size, wide);
#pragma omp simd
    for (int j = 0; j < size; ++j) x[j] = Signed ? c.read_widened(wide[j], absmax) : c.read_unsigned(wide[j], absmax);
  }
};

template <int kFields, class Body>
void run(const TensorList<kFields>& tensors, int threads, const Body& body) {
  parallel_for(tensors.pieces(), tensors.elements(), threads, ForBlocks<kFields, Body>{tensors, body});
}

// Calls f with the code map that `maps` stands for.
template <class F>
void with_code(const float* maps, F&& f) {
  if (maps == nullptr)
    f(Companded{});
  else
    f(Dynamic{maps, maps + 256});
}

template <template <class> class Body, int kFields>
void update(const int64_t* rows, int64_t count, const float* scalars, const float* maps, DType grad_dtype,
            DType copy_dtype, int threads) {
  const TensorList<kFields> tensors(rows, count);
  AdamWStep step;
  std::memcpy(&step, scalars, sizeof step);
  with_code(maps, [&](auto code) {
    run(tensors, threads, Body<decltype(code)>{step, code, grad_dtype, copy_dtype});
  });
}

}  // namespace

void adamw8bit(const int64_t* rows, int64_t count, const float* scalars, const float* maps, DType grad_dtype,
               DType copy_dtype, int threads) {
  update<AdamW8bit, 8>(rows, count, scalars, maps, grad_dtype, copy_dtype, threads);
}

void lion8bit(const int64_t* rows, int64_t count, const float* scalars, const float* maps, DType grad_dtype,
              DType copy_dtype, int threads) {
  update<Lion8bit, 6>(rows, count, scalars, maps, grad_dtype, copy_dtype, threads);
}

void quantize8(const float* x, uint8_t* codes, float* absmax, int64_t numel, int is_signed, const float* maps,
               int threads) {
  const int64_t row[] = {numel, reinterpret_cast<int64_t>(x), reinterpret_cast<int64_t>(codes),
                         reinterpret_cast<int64_t>(absmax)};
  const TensorList<4> tensors(row, 1);
  with_code(maps, [&](auto code) {
    if (is_signed)
      run(tensors, threads, Quantize<decltype(code), true>{code});
    else
      run(tensors, threads, Quantize<decltype(code), false>{code});
  });
}

void dequantize8(const uint8_t* codes, const float* absmax, float* x, int64_t numel, int is_signed, const float* maps,
                 int threads) {
  const int64_t row[] = {numel, reinterpret_cast<int64_t>(x), reinterpret_cast<int64_t>(codes),
                         reinterpret_cast<int64_t>(absmax)};
  const TensorList<4> tensors(row, 1);
  with_code(maps, [&](auto code) {
    if (is_signed)
      run(tensors, threads, Dequantize<decltype(code), true>{code});
    else
      run(tensors, threads, Dequantize<decltype(code), false>{code});
  });
}

}  // namespace fastft
