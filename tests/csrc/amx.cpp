// The kernels of attention as they run on AMX. Where the CPU has no tiles, each of their instructions ends in SIGILL, and is
// decoded here, carried out on EmulatedTiles and stepped over: so the encoded registers, addresses and strides are seen.
#include <csignal>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <ucontext.h>

#include "common/amx.h"
#include "cpu/attention.h"

using namespace fastft;

namespace {

volatile sig_atomic_t trapped = 0;

int64_t register_of(const ucontext_t* context, int number) {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kOrder[number]];
}

void unknown() {
  std::fputs("an instruction that is not AMX's\n", stderr);
  std::_Exit(1);
}

// A VEX instruction of three bytes of prefix: opcode, ModRM, and with memory SIB and displacement.
void carry_out(int, siginfo_t*, void* raw) {
  ucontext_t* context = static_cast<ucontext_t*>(raw);
  const uint8_t* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  const uint8_t *vex = code, modrm = code[4];
  if (vex[0] != 0xc4 || (vex[1] & 0x1f) != 2 || (vex[2] & 0x84) != 0) unknown();  // map 0F38, W 0, 128 bits
  const int opcode = code[3], prefix = vex[2] & 3, mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  const uint8_t* next = code + 5;
  int64_t address = 0, stride = 0;
  if (mod != 3) {
    int base = rm, displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    const bool sib = rm == 4;
    if (sib) {
      const int index = (*next >> 3 & 7) | (vex[1] & 0x40 ? 0 : 8);
      base = *next & 7;
      if (index != 4) stride = register_of(context, index) << (*next >> 6);
      ++next;
    }
    const bool absolute = mod == 0 && base == 5;
    if (absolute) displacement = 4;
    int32_t offset = 0;
    if (displacement == 1) offset = static_cast<int8_t>(*next);
    if (displacement == 4) std::memcpy(&offset, next, 4);
    next += displacement;
    if (!absolute) address = register_of(context, base | (vex[1] & 0x20 ? 0 : 8));
    if (absolute && !sib) address = reinterpret_cast<int64_t>(next);
    address += offset;
  }
  void* memory = reinterpret_cast<void*>(address);
  if (opcode == 0x49 && prefix == 0 && mod == 3)
    EmulatedTiles::release();
  else if (opcode == 0x49 && prefix == 0)
    EmulatedTiles::configure(*static_cast<const TileConfig*>(memory));
  else if (opcode == 0x49 && prefix == 3 && mod == 3)
    EmulatedTiles::zero(reg);
  else if (opcode == 0x4b && prefix == 3 && rm == 4)
    EmulatedTiles::load(reg, memory, stride);
  else if (opcode == 0x4b && prefix == 2 && rm == 4)
    EmulatedTiles::store(reg, memory, stride);
  else if (opcode == 0x5c && prefix == 2 && mod == 3)
    EmulatedTiles::multiply(reg, rm, ~vex[2] >> 3 & 7);
  else
    unknown();
  context->uc_mcontext.gregs[REG_RIP] += next - code;
  trapped = 1;
}

std::vector<uint16_t> random_values(int64_t n) {
  std::vector<uint16_t> values(n);
  for (uint16_t& value : values) {
    BFloat16 narrowed;
    narrow(static_cast<float>(std::rand()) / RAND_MAX * 4.0f - 2.0f, narrowed);
    value = narrowed.bits;
  }
  return values;
}

// o, dq, dk, dv and lse of two packed sequences, causal, with dropout and grouped heads.
std::vector<float> attention(Matrix matrix, int64_t d) {
  active_matrix() = matrix;
  std::srand(1);
  const int64_t heads = 4, heads_k = 2, tokens = 170, n = tokens * heads * d, n_k = tokens * heads_k * d;
  const int32_t cu_seqlens[] = {0, 133, 170};
  const AttentionShape shape = {2, heads, heads_k, d, 0, 0, tokens, int64_t{1} << 40, 0, 6554,
                                {0, heads * d, d}, {0, heads_k * d, d}, {0, heads_k * d, d}, {0, 1, tokens},
                                {0, heads * d, d}, {0, 1, tokens}};
  const auto q = random_values(n), k = random_values(n_k), v = random_values(n_k), dout = random_values(n);
  std::vector<uint16_t> o(n), dq(n), dk(n_k), dv(n_k);
  std::vector<float> lse(tokens * heads);
  attention_forward(&shape, q.data(), k.data(), v.data(), cu_seqlens, cu_seqlens, nullptr, o.data(), lse.data(), 0.2f, 0.0f,
                    7, DType::bfloat16, 2);
  attention_backward(&shape, dout.data(), nullptr, q.data(), k.data(), v.data(), o.data(), lse.data(), cu_seqlens, cu_seqlens,
                     nullptr, dq.data(), dk.data(), dv.data(), 0.2f, 0.0f, 7, DType::bfloat16, 2);
  std::vector<float> all = lse;
  for (const auto* part : {&o, &dq, &dk, &dv})
    for (uint16_t bits : *part) all.push_back(widen(BFloat16{bits}));
  return all;
}

}  // namespace

int main() {
  if (!supports(Matrix::avx512_bf16)) return std::puts("no AVX512-BF16"), 0;
  const bool native = supports(Matrix::amx_bf16);
  if (!native) {
    struct sigaction action = {};
    action.sa_sigaction = carry_out;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }
  for (int64_t d : {16, 40, 64}) {
    const auto ours = attention(Matrix::amx_bf16, d), same = attention(Matrix::avx512_bf16, d);
    for (size_t i = 0; i < ours.size(); ++i)
      if (!(std::fabs(ours[i] - same[i]) <= 0.02f * (0.5f + std::fabs(same[i])))) {
        std::fprintf(stderr, "head size %d, number %d: %g, by vectors %g\n", static_cast<int>(d), static_cast<int>(i),
                     ours[i], same[i]);
        return 1;
      }
  }
  std::puts(native ? "native" : trapped ? "emulated" : "not one instruction of AMX was met");
}
