// The element types of tensors: how each is widened to float and rounded back (to nearest even, NaN kept).
//
// The conversions are written without branches so that loops over them vectorise on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/isa.h"

namespace fastft {

enum class DType : int { float32, bfloat16, float16 };
constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16"};

FASTFT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTFT_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FASTFT_INLINE float widen(float value) { return value; }

FASTFT_INLINE float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

FASTFT_INLINE float widen(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  // The exponent is rebiased by 127 - 15, twice for infinity and NaN; a subnormal is renormalised by a subtraction.
  const uint32_t normal = magnitude + (112u << 23) + (magnitude >= (31u << 23) ? 112u << 23 : 0u);
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  return float_of((magnitude < (1u << 23) ? subnormal : normal) | sign);
}

FASTFT_INLINE void narrow(float value, float& out) { out = value; }

FASTFT_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((value == value ? rounded : 0x7fc00000u) >> 16);
}

// The bits of a value that is not NaN, rounded to bfloat16 and in its upper half.
FASTFT_INLINE uint32_t rounded_bits(float value) {
  const uint32_t bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// narrow for values that are known not to be NaN: a comparison and a choice less.
template <class T>
FASTFT_INLINE void narrow_number(float value, T& out) {
  narrow(value, out);
}

FASTFT_INLINE void narrow_number(float value, BFloat16& out) {
  out.bits = static_cast<uint16_t>(rounded_bits(value) >> 16);
}

FASTFT_INLINE void narrow(float value, Float16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below the smallest normal half, adding 0.5 leaves the rounded subnormal in the low mantissa bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>((magnitude < (143u << 23) ? finite : special) | ((bits >> 16) & 0x8000u));
}

// What `value` becomes when it is stored as T and read again.
template <class T>
FASTFT_INLINE float rounded(float value) {
  T stored;
  narrow(value, stored);
  return widen(stored);
}

// The same numbers without the way through 16 bits, which costs three times as much.
template <>
FASTFT_INLINE float rounded<Float16>(float value) {
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f - 0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fc00000u : 0x7f800000u;
  return float_of((finite < (143u << 23) ? finite : special) | sign);
}

template <class T>
FASTFT_INLINE float rounded_number(float value) {
  return rounded<T>(value);
}

template <>
FASTFT_INLINE float rounded_number<BFloat16>(float value) {
  return float_of(rounded_bits(value) & 0xffff0000u);
}

template <class T>
FASTFT_INLINE void widen_row(const T* from, int64_t n, float factor, float* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = widen(from[j]) * factor;
}

template <class T>
FASTFT_INLINE void narrow_row(const float* from, int64_t n, float factor, T* to) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(from[j] * factor, to[j]);
}

// The same where the type is asked for at run time, row by row: for bodies too large to be compiled for each type.
FASTFT_INLINE void widen_row(const void* from, DType dtype, int64_t offset, int64_t n, float factor, float* to) {
  if (dtype == DType::float32)
    widen_row(static_cast<const float*>(from) + offset, n, factor, to);
  else if (dtype == DType::bfloat16)
    widen_row(static_cast<const BFloat16*>(from) + offset, n, factor, to);
  else
    widen_row(static_cast<const Float16*>(from) + offset, n, factor, to);
}

FASTFT_INLINE void narrow_row(const float* from, int64_t n, float factor, void* to, DType dtype, int64_t offset) {
  if (dtype == DType::float32)
    narrow_row(from, n, factor, static_cast<float*>(to) + offset);
  else if (dtype == DType::bfloat16)
    narrow_row(from, n, factor, static_cast<BFloat16*>(to) + offset);
  else
    narrow_row(from, n, factor, static_cast<Float16*>(to) + offset);
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with Type<T>, T being the element type that `dtype` stands for.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>{});
    case DType::bfloat16:
      return f(Type<BFloat16>{});
    case DType::float16:
      return f(Type<Float16>{});
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace fastft
