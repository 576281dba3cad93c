// One source for every instruction set, chosen at run time.
//
// An op writes its rows as a functor whose operator()(begin, end) is FASTFT_INLINE. `for_active_isa<Body>()` returns a
// function that has this body inlined and vectorised for the best instruction set of the running CPU. There are no
// intrinsics that compute: kernels are plain loops over kLanes fixed lanes (lanes.h), and floating point contraction is
// off (setup.py), so all instruction sets compute the same bits. AVX-512 adds registers and width, never other numbers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)  // the arithmetic of common/ is that of the GPU too
#define FASTFT_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FASTFT_INLINE __forceinline
#else
#define FASTFT_INLINE inline __attribute__((always_inline))
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTFT_X86 1
#define FASTFT_ISA_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace fastft {

// "scalar" is what the compiler targets by default: SSE2 on x86-64, NEON on 64-bit ARM.
enum class Isa { scalar, avx2, avx512 };
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512"};

inline Isa best_isa() {
#ifdef FASTFT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
  return Isa::scalar;
}

// Tests lower it to compare instruction sets; nothing else writes it.
inline Isa& active_isa() {
  static Isa isa = best_isa();
  return isa;
}

template <class Body>
void run_scalar(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#ifdef FASTFT_X86
template <class Body>
__attribute__((target("avx2"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <class Body>
FASTFT_ISA_AVX512 void run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}
#endif

template <class Body>
auto for_active_isa() -> void (*)(const Body&, int64_t, int64_t) {
#ifdef FASTFT_X86
  if (active_isa() == Isa::avx512) return run_avx512<Body>;
  if (active_isa() == Isa::avx2) return run_avx2<Body>;
#endif
  return run_scalar<Body>;
}

}  // namespace fastft
