// Which instructions multiply bfloat16 matrices, chosen at run time.
#pragma once

#include <cstdint>

#include "common/isa.h"

// Compilers that know AVX512-BF16 and the assembler's names of AMX.
#if defined(FASTFT_X86) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FASTFT_X86_BF16 1
#include <cpuid.h>
#endif
#if defined(FASTFT_X86_BF16) && defined(__linux__)
#define FASTFT_X86_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastft {

// "emulated" are AMX's tiles in plain C++, for tests on every machine.
enum class Matrix { none, emulated, avx512_bf16, amx_bf16 };
constexpr const char* kMatrixNames[] = {"none", "emulated", "avx512_bf16", "amx_bf16"};
constexpr int kMatrices = 4;

inline bool has_avx512_bf16() {
#ifdef FASTFT_X86_BF16
  unsigned a, b, c, d;
  return best_isa() == Isa::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
#else
  return false;
#endif
}

// The CPU has the tiles, the system saves them, and has let this process use them.
inline bool has_amx_bf16() {
#ifdef FASTFT_X86_AMX
  constexpr unsigned kTiles = 1u << 24 | 1u << 22, kSaved = 1u << 17 | 1u << 18, kXsave = 1u << 27;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline bool supports(Matrix matrix) {
  static const bool avx512_bf16 = has_avx512_bf16(), amx_bf16 = has_amx_bf16();
  return matrix == Matrix::avx512_bf16 ? avx512_bf16 : matrix == Matrix::amx_bf16 ? amx_bf16 : true;
}

// Tests change it; nothing else writes it.
inline Matrix& active_matrix() {
  static Matrix matrix = supports(Matrix::amx_bf16)      ? Matrix::amx_bf16
                         : supports(Matrix::avx512_bf16) ? Matrix::avx512_bf16
                                                         : Matrix::none;
  return matrix;
}

}  // namespace fastft
