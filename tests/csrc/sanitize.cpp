// Every CPU kernel under the address and undefined-behaviour sanitizers, without Python: test_sanitizers.py compiles this
// together with csrc/cpu/*.cpp. A kernel is added as one `case_...` function, called in main for each instruction set.
//
// Buffers are exactly as large as they must be and begin at an odd element, so a read or write beyond them is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "common/matrix.h"
#include "common/quantize8.h"
#include "common/tensor_list.h"
#include "cpu/adamw.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/dora.h"
#include "cpu/dropout.h"
#include "cpu/gated_activation.h"
#include "cpu/gelu.h"
#include "cpu/layer_norm.h"
#include "cpu/lora.h"
#include "cpu/nf4.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"

using namespace fastft;

namespace {

const int64_t kSizes[] = {1, 15, 255, 256, 257, 16384, 16385, 40001};
const DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// `n` elements of `size` bytes in a block of their own, one element after its start; random bytes: NaN and infinity too.
class Buffer {
 public:
  Buffer(int64_t n, int64_t size, bool random) : bytes_(new uint8_t[(n + 1) * size]), offset_(size) {
    for (int64_t i = 0; i < (n + 1) * size; ++i) bytes_[i] = random ? static_cast<uint8_t>(std::rand() >> 8) : 0;
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes_.get() + offset_);
  }
  int64_t address() { return reinterpret_cast<int64_t>(bytes_.get() + offset_); }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  int64_t offset_;
};

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// As the GPU reads and writes them: a byte each.
void case_codes(const float* maps) {
  const Companded companded;
  const Dynamic dynamic{maps, maps + 256};
  for (int c = 0; c < 256; ++c) {
    const uint8_t code = static_cast<uint8_t>(c);
    if (c != 128) {  // no code
      const float value = companded.read_signed(code, 3.0f);
      check((value < 0.0f) == (c > 128) && std::fabs(value) <= 3.0f, "codes from 129 on are negative");
      check(companded.write_signed(value, 1.0f / 3.0f) == c, "codes come back");
    }
    check(dynamic.read_signed(code, 3.0f) == 3.0f * maps[c], "a code is a place in the map");
  }
}

void case_adamw(DType grad, DType copy, const float* maps) {
  const float scalars[] = {0.5f, 0.99f, 0.9f, 0.1f, 0.999f, 0.001f, 0.01f, 1.5f, 1e-8f};
  for (int64_t n : kSizes) {
    const int64_t blocks = (n + 255) / 256;
    Buffer w(n, 4, false), g(n, size_of(grad), true), c(n, size_of(copy), false), m(n, 4, false), v(n, 4, false);
    Buffer m_codes(blocks * 256, 1, false), m_absmax(blocks, 4, false);
    Buffer v_codes(blocks * 256, 1, false), v_absmax(blocks, 4, false);
    const int64_t wide[] = {n, w.address(), g.address(), c.address(), m.address(), v.address()};
    const int64_t row[] = {n, w.address(), g.address(), c.address(), m_codes.address(), m_absmax.address(),
                           v_codes.address(), v_absmax.address()};
    for (int step = 0; step < 2; ++step) {
      adamw8bit(row, 1, scalars, maps, grad, copy, 2);
      lion8bit(row, 1, scalars, maps, grad, copy, 2);
    }
    for (int64_t i = 0; i < n; ++i) check(std::isfinite(w.as<float>()[i]), "8-bit weights stay finite");
    for (int64_t i = 0; i < blocks; ++i) check(std::isfinite(v_absmax.as<float>()[i]), "moments stay finite");
    dequantize8(m_codes.as<uint8_t>(), m_absmax.as<float>(), m.as<float>(), n, 1, maps, 2);
    dequantize8(v_codes.as<uint8_t>(), v_absmax.as<float>(), v.as<float>(), n, 0, maps, 2);
    quantize8(m.as<float>(), m_codes.as<uint8_t>(), m_absmax.as<float>(), n, 1, maps, 2);
    quantize8(v.as<float>(), v_codes.as<uint8_t>(), v_absmax.as<float>(), n, 0, maps, 2);
    const int64_t untouched[] = {n, w.address(), 0, 0, m.address(), v.address()};  // neither a gradient nor a copy
    adamw(untouched, 1, scalars, grad, copy, 2);
    const int64_t decayed[] = {n, w.address(), 0, c.address(), m.address(), v.address()};
    adamw(decayed, 1, scalars, grad, copy, 2);
    adamw(wide, 1, scalars, grad, copy, 2);
    const int64_t gradient[] = {n, g.address()};
    double sum;
    square_sum(gradient, 1, &sum, grad, 2);
  }
}

void case_rms_norm(DType dtype) {
  const int64_t rows = 3, cols = 77, n = rows * cols, size = size_of(dtype);
  Buffer x(n, size, true), weight(cols, size, true), y(n, size, false), rstd(rows, 4, false);
  Buffer dx(n, size, false), dweight(cols, size, false);
  for (float offset : {0.0f, 1.0f}) {
    rms_norm_forward(x.as<void>(), cols, nullptr, 0, weight.as<void>(), y.as<void>(), nullptr, rstd.as<float>(), rows,
                     cols, 1e-6f, offset, dtype, dtype, 2);
    rms_norm_backward(y.as<void>(), cols, nullptr, 0, x.as<void>(), cols, weight.as<void>(), rstd.as<float>(),
                      dx.as<void>(), dweight.as<void>(), rows, cols, offset, dtype, dtype, 2);
  }
}

void case_dora(DType dtype) {
  const int64_t rows = 3, cols = 77, n = rows * cols, size = size_of(dtype);
  Buffer z(n, size, true), u(n, size, true), bias(cols, size, true), gain(cols, 4, true), y(n, size, false);
  Buffer dz(n, size, false), dgain(cols, 4, false), dbias(cols, 4, false);
  dora_forward(z.as<void>(), cols, gain.as<void>(), u.as<void>(), cols, gain.as<void>(), bias.as<void>(), y.as<void>(), rows,
               cols, dtype, dtype, 2);
  dora_backward(y.as<void>(), cols, z.as<void>(), cols, gain.as<void>(), dz.as<void>(), dgain.as<void>(),
                dbias.as<void>(), rows, cols, dtype, 2);
}

// Alone, and with dropout and a residual in front.
void case_layer_norm(DType dtype) {
  const int64_t rows = 3, cols = 77, n = rows * cols, size = size_of(dtype);
  Buffer x(n, size, true), residual(n, size, true), weight(cols, size, true), y(n, size, false), h(n, size, false);
  Buffer mean(rows, 4, false), rstd(rows, 4, false), dx(n, size, false), dh(n, size, false);
  Buffer dweight(cols, size, false), dbias(cols, size, false);
  layer_norm_forward(x.as<void>(), cols, nullptr, 0, weight.as<void>(), weight.as<void>(), y.as<void>(), nullptr,
                     mean.as<float>(), rstd.as<float>(), rows, cols, 1e-6f, 0, 1.0f, 0, dtype, dtype, 2);
  layer_norm_backward(y.as<void>(), cols, nullptr, 0, x.as<void>(), cols, weight.as<void>(), mean.as<float>(),
                      rstd.as<float>(), dx.as<void>(), nullptr, nullptr, nullptr, rows, cols, 0, 1.0f, 0, dtype, dtype, 2);
  layer_norm_forward(x.as<void>(), cols, residual.as<void>(), cols, weight.as<void>(), nullptr, y.as<void>(),
                     h.as<void>(), mean.as<float>(), rstd.as<float>(), rows, cols, 1e-6f, 6554, 1.1f, 5, dtype, dtype, 2);
  layer_norm_backward(y.as<void>(), cols, y.as<void>(), cols, h.as<void>(), cols, weight.as<void>(), mean.as<float>(),
                      rstd.as<float>(), dx.as<void>(), dh.as<void>(), dweight.as<void>(), dbias.as<void>(), rows, cols,
                      6554, 1.1f, 5, dtype, dtype, 2);
}

void case_dropout(DType dtype) {
  for (int64_t n : {1, 7, 8, 1023, 1024, 1025, 40001}) {
    Buffer x(n, size_of(dtype), true), y(n, size_of(dtype), false);
    dropout(x.as<void>(), y.as<void>(), n, 6554, 1.1f, 3, dtype, 2);
    dropout(x.as<void>(), x.as<void>(), n, 6554, 1.0f, -3, dtype, 2);
    lora_apply_mask(x.as<void>(), y.as<void>(), n, 3, 6554, dtype, 2);
  }
}

void case_cross_entropy(DType dtype) {
  const int64_t rows = 4, size = size_of(dtype);
  for (int64_t cols : {1, 15, 77, 1025}) {
    Buffer logits(rows * cols, size, true), labels(rows, 8, false), scale(rows, 4, true), loss(rows, 4, false);
    Buffer log_prob(rows, 4, false), correct(rows, 1, false), entropy(rows, 4, false);
    labels.as<int64_t>()[0] = cols - 1, labels.as<int64_t>()[1] = -100;
    for (bool gradient : {false, true})
      cross_entropy_forward(logits.as<void>(), cols, labels.as<int64_t>(), gradient ? scale.as<float>() : nullptr,
                            loss.as<float>(), log_prob.as<float>(), correct.as<uint8_t>(), entropy.as<float>(), rows, cols,
                            -100, gradient ? 0.1f : 0.0f, gradient ? 30.0f : 0.0f, 1e-4f, gradient, dtype, 2);
  }
}

// Packed sequences with a window, soft-capping and dropout, some without queries or keys; then a batch whose keys are bounded.
void case_attention(DType dtype) {
  const int64_t heads = 4, heads_k = 2, size = size_of(dtype);
  const int32_t cu_seqlens_q[] = {0, 65, 65, 70, 71}, cu_seqlens_k[] = {0, 70, 73, 73, 202};
  const int64_t key_bounds[] = {3, 50, 0, 0};
  for (int64_t d : {1, 13, 32, 160})
    for (bool packed : {true, false}) {
      const int64_t sequences = packed ? 4 : 2, queries = packed ? 71 : 17, keys = packed ? 202 : 70;
      const int64_t batches = packed ? 1 : 2, tokens = batches * queries, tokens_k = batches * keys;
      const AttentionShape shape = {sequences, heads, heads_k, d, queries, keys, tokens,
                                    packed ? 9 : int64_t{1} << 40, packed ? 0 : int64_t{1} << 40, packed ? 6554 : 0,
                                    {queries * heads * d, heads * d, d}, {keys * heads_k * d, heads_k * d, d},
                                    {keys * heads_k * d, heads_k * d, d}, {queries * heads, 1, queries},
                                    {queries * heads * d, heads * d, d}, {queries * heads, 1, queries}};
      Buffer q(tokens * heads * d, size, true), k(tokens_k * heads_k * d, size, true), v(tokens_k * heads_k * d, size, true);
      Buffer o(tokens * heads * d, size, false), lse(tokens * heads, 4, false), dlse(tokens * heads, 4, true);
      Buffer dq(tokens * heads * d, size, false), dk(tokens_k * heads_k * d, size, false);
      Buffer dv(tokens_k * heads_k * d, size, false);
      const int32_t* cu_q = packed ? cu_seqlens_q : nullptr;
      const int32_t* cu_k = packed ? cu_seqlens_k : nullptr;
      const int64_t* bounds = packed ? nullptr : key_bounds;
      const float softcap = packed ? 5.0f : 0.0f;
      attention_forward(&shape, q.as<void>(), k.as<void>(), v.as<void>(), cu_q, cu_k, bounds, o.as<void>(),
                        lse.as<float>(), 0.3f, softcap, 7, dtype, 2);
      attention_backward(&shape, q.as<void>(), packed ? dlse.as<float>() : nullptr, q.as<void>(), k.as<void>(),
                         v.as<void>(), o.as<void>(), lse.as<float>(), cu_q, cu_k, bounds, dq.as<void>(), dk.as<void>(),
                         dv.as<void>(), 0.3f, softcap, 7, dtype, 2);
    }
}

void case_rope(DType dtype, DType angle_dtype) {
  const int64_t size = size_of(dtype);
  for (int64_t half : {1, 13, 64, 77}) {
    const int64_t tokens = 5, heads_q = 3, heads_k = 2, d = 2 * half + 1;
    const int64_t n_q = tokens * heads_q * d, n_k = tokens * heads_k * d, angles = tokens * 2 * half;
    const RopeShape shape = {1, tokens, heads_q, heads_k, d, half,
                             {0, heads_q * d, d}, {0, d, tokens * d}, {0, d, tokens * d}, {0, heads_k * d, d},
                             {0, 2 * half}, {0, 2 * half}};
    Buffer q(n_q, size, true), k(n_k, size, true), q_out(n_q, size, false), k_out(n_k, size, false);
    Buffer cos(angles, size_of(angle_dtype), true), sin(angles, size_of(angle_dtype), true);
    for (bool inverse : {false, true})
      rope(&shape, q.as<void>(), k.as<void>(), cos.as<void>(), sin.as<void>(), q_out.as<void>(), k_out.as<void>(),
           inverse, dtype, angle_dtype, 2);
  }
}

void case_nf4(DType dtype) {
  const int64_t size = size_of(dtype);
  for (int64_t n : {1, 63, 64, 65, 1000}) {
    const int64_t blocks = (n + 63) / 64;
    Buffer x(n, size, true), y(n, size, false), codes((n + 1) / 2, 1, false), absmax(blocks, 4, false);
    Buffer codes8(blocks, 1, true), map(256, 4, true), nested(1, 4, true);
    nf4_quantize(x.as<void>(), codes.as<uint8_t>(), absmax.as<float>(), n, 64, dtype, 2);
    nf4_dequantize(codes.as<uint8_t>(), absmax.as<void>(), nullptr, nullptr, 0.0f, y.as<void>(), n, 64, dtype, 2);
    nf4_dequantize(codes.as<uint8_t>(), codes8.as<void>(), map.as<float>(), nested.as<float>(), 0.5f, y.as<void>(), n, 64,
                   dtype, 2);
  }
}

void case_activations(DType dtype) {
  const int64_t rows = 3, cols = 77, n = rows * cols, size = size_of(dtype);
  Buffer x(n, size, true), bias(cols, size, true), y(n, size, false), dx(n, size, false), dbias(cols, size, false);
  for (Activation act : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    gelu_forward(x.as<void>(), cols, bias.as<void>(), y.as<void>(), rows, cols, act, dtype, dtype, 2);
    gelu_backward(y.as<void>(), cols, x.as<void>(), cols, bias.as<void>(), dx.as<void>(), dbias.as<void>(), rows, cols,
                  act, dtype, dtype, 2);
    gelu_backward(y.as<void>(), cols, x.as<void>(), cols, nullptr, dx.as<void>(), nullptr, rows, cols, act, dtype, dtype,
                  2);
    gated_activation_forward(x.as<void>(), cols, y.as<void>(), cols, dx.as<void>(), rows, cols, act, dtype, 2);
    Buffer dup(n, size, false);
    gated_activation_backward(y.as<void>(), cols, x.as<void>(), cols, y.as<void>(), cols, dx.as<void>(), dup.as<void>(),
                              rows, cols, act, dtype, 2);
  }
}

// More than 2^31 elements: the arithmetic of pieces, on tensors that are not there.
void case_many_elements() {
  const int64_t big = (int64_t{1} << 33) + 5, rows[] = {7, 0, big, 0, 0, 0, 3, 0};
  const TensorList<2> tensors(rows, 4);
  check(tensors.elements() == big + 10, "elements are counted in 64 bits");
  check(tensors.pieces() == 1 + (big + kPiece - 1) / kPiece + 1, "pieces");
  const auto last_of_big = tensors.piece(tensors.pieces() - 2);
  check(last_of_big.row == rows + 2 && last_of_big.begin == big - 5 && last_of_big.size == 5, "the end of a big tensor");
  const auto last = tensors.piece(tensors.pieces() - 1);
  check(last.row == rows + 6 && last.begin == 0 && last.size == 3, "the tensor after an empty one");
}

}  // namespace

int main() {
  std::vector<float> maps(512);
  for (int i = 0; i < 512; ++i) maps[i] = i < 256 ? (i - 127) / 128.0f : (i - 256) / 255.0f;
  case_many_elements();
  case_codes(maps.data());
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    active_isa() = static_cast<Isa>(isa);
    for (DType grad : kDTypes) {
      case_attention(grad);
      case_cross_entropy(grad);
      case_dropout(grad);
      case_layer_norm(grad);
      case_rms_norm(grad);
      case_dora(grad);
      case_nf4(grad);
      case_activations(grad);
      for (DType copy : kDTypes) case_adamw(grad, copy, nullptr);
      for (DType angle : kDTypes) case_rope(grad, angle);
      case_adamw(grad, DType::bfloat16, maps.data());
    }
  }
  for (int matrix = 0; matrix < kMatrices; ++matrix)
    if (supports(static_cast<Matrix>(matrix))) {
      active_matrix() = static_cast<Matrix>(matrix);
      case_attention(DType::bfloat16);
    }
  std::puts("clean");
}
