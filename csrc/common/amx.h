// Products of pairs (pairs.h) on AMX's tiles: eight registers of 16 rows of 64 bytes, and c += a b of whole registers.
//
// TilePairs is written once over the instructions. AmxTiles are those of the CPU. EmulatedTiles do the same in plain C++,
// and end the process where the CPU would refuse an instruction: so tests on any machine see how the tiles are configured,
// loaded and multiplied. What the instructions do: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/pairs.h"

namespace fastft {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// The number of a tile, a part of the instruction.
template <int T>
using Number = std::integral_constant<int, T>;

// What LDTILECFG reads.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int t = 0; t < kTiles; ++t) row_bytes[t] = kTileBytes, rows[t] = kTileRows;
  }
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

class EmulatedTiles {
 public:
  static void configure(const TileConfig& config) {
    State& s = state();
    demand(config.palette == 1 && config.start_row == 0);
    for (int i = 0; i < 14; ++i) demand(config.reserved[i] == 0);
    for (int t = 0; t < 16; ++t) {
      demand(t < kTiles ? config.row_bytes[t] <= kTileBytes && config.rows[t] <= kTileRows
                        : config.row_bytes[t] == 0 && config.rows[t] == 0);
      demand((config.row_bytes[t] == 0) == (config.rows[t] == 0));
    }
    s = State{};
    s.config = config;
    s.configured = true;
  }
  static void release() { state() = State{}; }

  static void zero(int t) { clear(state(), t); }
  // Rows of memory, `stride` bytes apart; what is behind a row or below the last becomes zero.
  static void load(int t, const void* from, int64_t stride) {
    State& s = state();
    clear(s, t);
    for (int r = 0; r < s.config.rows[t]; ++r)
      std::memcpy(s.tile[t][r], static_cast<const char*>(from) + r * stride, s.config.row_bytes[t]);
  }
  static void store(int t, void* to, int64_t stride) {
    State& s = state();
    demand(s.configured && s.config.rows[t] != 0);
    for (int r = 0; r < s.config.rows[t]; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, s.tile[t][r], s.config.row_bytes[t]);
  }
  // TDPBF16PS: the sums of even and of odd elements apart, by fused multiply-adds; denormals are zero, read or written.
  static void multiply(int c, int a, int b) {
    State& s = state();
    const TileConfig& config = s.config;
    demand(s.configured && c != a && c != b && a != b);
    demand(config.rows[c] != 0 && config.rows[a] == config.rows[c] && config.row_bytes[b] == config.row_bytes[c]);
    demand(config.row_bytes[a] % 4 == 0 && config.row_bytes[c] % 4 == 0 && config.row_bytes[a] / 4 == config.rows[b]);
    for (int m = 0; m < config.rows[c]; ++m)
      for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
          const uint32_t x = s.word(a, m, k), y = s.word(b, k, n);
          even = flushed(std::fma(flushed(float_of(x << 16)), flushed(float_of(y << 16)), even));
          odd = flushed(std::fma(flushed(float_of(x & 0xffff0000u)), flushed(float_of(y & 0xffff0000u)), odd));
        }
        const float sum = flushed(flushed(float_of(s.word(c, m, n))) + flushed(even + odd));
        std::memcpy(s.tile[c][m] + 4 * n, &sum, sizeof sum);
      }
  }

 private:
  struct State {
    TileConfig config;
    bool configured = false;
    unsigned char tile[kTiles][kTileRows][kTileBytes] = {};

    uint32_t word(int t, int row, int column) const {
      uint32_t bits;
      std::memcpy(&bits, tile[t][row] + 4 * column, sizeof bits);
      return bits;
    }
  };

  static State& state() {
    thread_local State state;
    return state;
  }
  static void clear(State& s, int t) {
    demand(s.configured && s.config.rows[t] != 0);
    std::memset(s.tile[t], 0, sizeof s.tile[t]);
  }
  static void demand(bool good) {
    if (!good) std::abort();
  }
  static float flushed(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x7f800000u) == 0 ? float_of(bits & 0x80000000u) : x;
  }
};

#ifdef FASTFT_X86_AMX
struct AmxTiles {
  static void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  static void release() { __asm__ volatile("tilerelease" ::); }

  template <int T>
  static void zero(Number<T>) {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static void load(Number<T>, const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(Number<T>, void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static void multiply(Number<C>, Number<A>, Number<B>) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

// Four registers of c at a time, [32, 32], for two of a and two of b: each is loaded once for two products.
template <class Tiles, int W>
struct TilePairs {
  static constexpr int kWidth = W, kColumns = 32, kInner = 32;

  // While it lives, the tiles of this thread are configured.
  struct Scope {
    Scope() { Tiles::configure(TileConfig()); }
    ~Scope() { Tiles::release(); }
  };

  // rows are rounded up to 32, cols too: a, b and c must be that large, what is behind the last row may be anything.
  template <bool ADD>
  static void multiply(int64_t rows, int64_t cols, int64_t inner, const BFloat16* a, int64_t lda, const uint32_t* b,
                       int64_t ldb, float* c, int64_t ldc) {
    for (int64_t i = 0; i < rows; i += 32)
      for (int64_t j = 0; j < cols; j += 32)
        multiply_block<ADD>(inner, a + i * lda, 2 * lda, b + j, 4 * ldb, c + i * ldc + j, 4 * ldc);
  }

 private:
  // Strides in bytes.
  template <bool ADD>
  static void multiply_block(int64_t inner, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                             int64_t ldc) {
    const auto below = [](auto* x, int64_t stride) { return x + kTileRows * stride / static_cast<int64_t>(sizeof *x); };
    float* c2 = below(c, ldc);
    if (ADD) {
      Tiles::load(Number<0>(), c, ldc), Tiles::load(Number<1>(), c + 16, ldc);
      Tiles::load(Number<2>(), c2, ldc), Tiles::load(Number<3>(), c2 + 16, ldc);
    } else {
      Tiles::zero(Number<0>()), Tiles::zero(Number<1>()), Tiles::zero(Number<2>()), Tiles::zero(Number<3>());
    }
    const BFloat16* a2 = below(a, lda);
    for (int64_t k = 0; k < inner; k += 32) {
      const uint32_t* rows = b + k / 2 * (ldb / 4);
      Tiles::load(Number<4>(), a + k, lda), Tiles::load(Number<6>(), rows, ldb);
      Tiles::load(Number<7>(), rows + 16, ldb), Tiles::load(Number<5>(), a2 + k, lda);
      Tiles::multiply(Number<0>(), Number<4>(), Number<6>()), Tiles::multiply(Number<1>(), Number<4>(), Number<7>());
      Tiles::multiply(Number<2>(), Number<5>(), Number<6>()), Tiles::multiply(Number<3>(), Number<5>(), Number<7>());
    }
    Tiles::store(Number<0>(), c, ldc), Tiles::store(Number<1>(), c + 16, ldc);
    Tiles::store(Number<2>(), c2, ldc), Tiles::store(Number<3>(), c2 + 16, ldc);
  }
};

struct EmulatedPairs : TilePairs<EmulatedTiles, 4> {
  static void narrow(int64_t rows, int64_t cols, const float* x, int64_t ld, BFloat16* by_rows, uint32_t* pairs) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < cols; ++j) {
        BFloat16 low, high;
        fastft::narrow(x[i * ld + j], low);
        fastft::narrow(x[(i + 1) * ld + j], high);
        if (by_rows != nullptr) by_rows[i * ld + j] = low, by_rows[(i + 1) * ld + j] = high;
        if (pairs != nullptr) pairs[i / 2 * ld + j] = low.bits | uint32_t{high.bits} << 16;
      }
  }
};

#ifdef FASTFT_X86_AMX
struct AmxPairs : TilePairs<AmxTiles, 16> {
  static void narrow(int64_t rows, int64_t cols, const float* x, int64_t ld, BFloat16* by_rows, uint32_t* pairs) {
    VectorPairs::narrow(rows, cols, x, ld, by_rows, pairs);
  }
};
#endif

}  // namespace fastft
