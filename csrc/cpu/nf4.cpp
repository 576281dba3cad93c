// Weights in 4 bits on the CPU. Equation and layout are in kernels/fastft_kernels/reference/nf4.py.
//
// Reading looks nothing up in memory: the 16 values of a block, already scaled and rounded, lie in registers as one vector
// for each of their bytes, and a byte shuffle picks from it for 16 codes at once. AVX-512 shuffles whole values.
#include "cpu/nf4.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/nf4.h"
#include "common/parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
#define FASTFT_SHUFFLE 1
#ifdef FASTFT_X86
#include <immintrin.h>
#define FASTFT_WIDE_SHUFFLE 1
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace fastft {
namespace {

constexpr int64_t kChunk = 32;  // elements read or written at once; the smallest block

template <class T>
struct Quantize {
  const T* x;
  uint8_t* codes;
  float* absmax;
  int64_t numel;
  int64_t block;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t from = number * block, size = std::min(block, numel - from);
      const T* in = x + from;
      float top = 0.0f;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < size; ++j) {
        const float magnitude = magnitude_of(widen(in[j]));
        top = top < magnitude ? magnitude : top;
      }
      absmax[number] = top;
      const float scale = nf4_scale(top);
      int64_t j = 0;
      for (; j + kChunk <= size; j += kChunk) write(in + j, kChunk, scale, codes + (from + j) / 2);
      if (j < size) write(in + j, size - j, scale, codes + (from + j) / 2);
    }
  }

  FASTFT_INLINE void write(const T* in, int64_t size, float scale, uint8_t* out) const {
    alignas(64) int32_t wide[kChunk];
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) wide[k] = nf4_code(widen(in[k]) * scale);
    if (size % 2) wide[size] = nf4_code(0.0f);
    for (int64_t k = 0; k < (size + 1) / 2; ++k) out[k] = static_cast<uint8_t>(wide[2 * k] << 4 | wide[2 * k + 1]);
  }
};

#ifdef FASTFT_SHUFFLE
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint32_t Quads __attribute__((vector_size(16)));

FASTFT_INLINE Bytes even_bytes(Bytes a, Bytes b) {
  return __builtin_shuffle(a, b, Bytes{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
}

FASTFT_INLINE Bytes odd_bytes(Bytes a, Bytes b) {
  return __builtin_shuffle(a, b, Bytes{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

// Their elements by turns, from the first or the second half of each.
FASTFT_INLINE Bytes zip_low(Bytes a, Bytes b) {
  return __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}

FASTFT_INLINE Bytes zip_high(Bytes a, Bytes b) {
  return __builtin_shuffle(a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

FASTFT_INLINE Words zip_low(Words a, Words b) { return __builtin_shuffle(a, b, Words{0, 8, 1, 9, 2, 10, 3, 11}); }
FASTFT_INLINE Words zip_high(Words a, Words b) { return __builtin_shuffle(a, b, Words{4, 12, 5, 13, 6, 14, 7, 15}); }
FASTFT_INLINE Quads zip_low(Quads a, Quads b) { return __builtin_shuffle(a, b, Quads{0, 4, 1, 5}); }
FASTFT_INLINE Quads zip_high(Quads a, Quads b) { return __builtin_shuffle(a, b, Quads{2, 6, 3, 7}); }

// The 16 values of a block in two bytes each: the low bytes and the high bytes.
struct HalfTable {
  Bytes low, high;

  explicit FASTFT_INLINE HalfTable(const void* values) {
    Bytes part[2];
    std::memcpy(part, values, sizeof part);
    low = even_bytes(part[0], part[1]);
    high = odd_bytes(part[0], part[1]);
  }

  // The values of the 32 codes in 16 bytes.
  FASTFT_INLINE void read(const uint8_t* in, void* out) const {
    Bytes packed;
    std::memcpy(&packed, in, sizeof packed);
    const Bytes first = packed >> 4, second = packed & 15;
    const Bytes a_low = __builtin_shuffle(low, first), a_high = __builtin_shuffle(high, first);
    const Bytes b_low = __builtin_shuffle(low, second), b_high = __builtin_shuffle(high, second);
    const Words a0 = (Words)zip_low(a_low, a_high), a1 = (Words)zip_high(a_low, a_high);
    const Words b0 = (Words)zip_low(b_low, b_high), b1 = (Words)zip_high(b_low, b_high);
    const Words done[4] = {zip_low(a0, b0), zip_high(a0, b0), zip_low(a1, b1), zip_high(a1, b1)};
    std::memcpy(out, done, sizeof done);
  }
};

// The same in four bytes each.
struct FloatTable {
  Bytes plane[4];

  explicit FASTFT_INLINE FloatTable(const void* values) {
    Bytes part[4];
    std::memcpy(part, values, sizeof part);
    const Bytes even0 = even_bytes(part[0], part[1]), even1 = even_bytes(part[2], part[3]);
    const Bytes odd0 = odd_bytes(part[0], part[1]), odd1 = odd_bytes(part[2], part[3]);
    plane[0] = even_bytes(even0, even1);
    plane[1] = even_bytes(odd0, odd1);
    plane[2] = odd_bytes(even0, even1);
    plane[3] = odd_bytes(odd0, odd1);
  }

  FASTFT_INLINE void pick(Bytes codes, Quads* values) const {
    const Bytes p0 = __builtin_shuffle(plane[0], codes), p1 = __builtin_shuffle(plane[1], codes);
    const Bytes p2 = __builtin_shuffle(plane[2], codes), p3 = __builtin_shuffle(plane[3], codes);
    const Words low0 = (Words)zip_low(p0, p1), low1 = (Words)zip_high(p0, p1);
    const Words high0 = (Words)zip_low(p2, p3), high1 = (Words)zip_high(p2, p3);
    values[0] = (Quads)zip_low(low0, high0);
    values[1] = (Quads)zip_high(low0, high0);
    values[2] = (Quads)zip_low(low1, high1);
    values[3] = (Quads)zip_high(low1, high1);
  }

  FASTFT_INLINE void read(const uint8_t* in, void* out) const {
    Bytes packed;
    std::memcpy(&packed, in, sizeof packed);
    Quads a[4], b[4], done[8];
    pick(packed >> 4, a);
    pick(packed & 15, b);
    for (int i = 0; i < 4; ++i) done[2 * i] = zip_low(a[i], b[i]), done[2 * i + 1] = zip_high(a[i], b[i]);
    std::memcpy(out, done, sizeof done);
  }
};

template <class T>
struct TableOf {
  using type = HalfTable;
};
template <>
struct TableOf<float> {
  using type = FloatTable;
};
#else
template <class T>
struct TableOf {
  using type = void;
};
#endif

#ifdef FASTFT_WIDE_SHUFFLE
// Of an index as many bits are read as there are values, so the code beside it in its byte need not be masked.
struct WideHalfTable {
  __m512i twice;

  FASTFT_ISA_AVX512 explicit WideHalfTable(const void* values)
      : twice(_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(values)))) {}

  FASTFT_ISA_AVX512 void read(const uint8_t* in, void* out) const {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, twice));
  }
};

struct WideFloatTable {
  __m512i values;

  FASTFT_ISA_AVX512 explicit WideFloatTable(const void* from) : values(_mm512_loadu_si512(from)) {}

  FASTFT_ISA_AVX512 void read(const uint8_t* in, void* out) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + 8 * half)));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
      _mm512_storeu_si512(static_cast<uint8_t*>(out) + 64 * half, _mm512_permutexvar_epi32(codes, values));
    }
  }
};
#endif

template <class T>
struct Dequantize {
  const uint8_t* codes;
  NF4Scales scales;
  T* y;
  int64_t numel;
  int64_t block;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const { read<typename TableOf<T>::type>(begin, end); }

  template <class Table>
  FASTFT_INLINE void read(int64_t begin, int64_t end) const {
    alignas(64) float plain[16];
    for (int c = 0; c < 16; ++c) plain[c] = nf4_value(c);
    for (int64_t number = begin; number < end; ++number) {
      const int64_t from = number * block, size = std::min(block, numel - from);
      const uint8_t* in = codes + from / 2;
      T* out = y + from;
      const float absmax = scales.at(number);
      alignas(64) T values[16];
#pragma omp simd
      for (int c = 0; c < 16; ++c) narrow(plain[c] * absmax, values[c]);
      int64_t j = 0;
#ifdef FASTFT_SHUFFLE
      const Table table(values);
      for (; j + kChunk <= size; j += kChunk) table.read(in + j / 2, out + j);
#endif
      for (; j < size; ++j) out[j] = values[j % 2 ? in[j / 2] & 15 : in[j / 2] >> 4];
    }
  }
};

#ifdef FASTFT_WIDE_SHUFFLE
template <class T>
struct DequantizeWide {
  using Table = typename std::conditional<sizeof(T) == 4, WideFloatTable, WideHalfTable>::type;
  Dequantize<T> of;

  FASTFT_ISA_AVX512 void operator()(int64_t begin, int64_t end) const { of.template read<Table>(begin, end); }
};
#endif

}  // namespace

void nf4_quantize(const void* x, uint8_t* codes, float* absmax, int64_t numel, int64_t block, DType dtype,
                  int threads) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for((numel + block - 1) / block, numel, threads,
                 Quantize<T>{static_cast<const T*>(x), codes, absmax, numel, block});
  });
}

void nf4_dequantize(const uint8_t* codes, const void* absmax, const float* map, const float* nested, float offset,
                    void* y, int64_t numel, int64_t block, DType dtype, int threads) {
  const NF4Scales scales{absmax, map, nested, offset};
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t blocks = (numel + block - 1) / block;
    const Dequantize<T> body{codes, scales, static_cast<T*>(y), numel, block};
#ifdef FASTFT_WIDE_SHUFFLE
    if (active_isa() == Isa::avx512) return parallel_for(blocks, numel, threads, DequantizeWide<T>{body});
#endif
    parallel_for(blocks, numel, threads, body);
  });
}

}  // namespace fastft
