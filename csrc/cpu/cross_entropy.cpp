// Softmax cross-entropy on the CPU. The equations are in kernels/fastft_kernels/reference/cross_entropy.py.
//
// A row is read from memory once: the sums and the gradient find it in the second level cache (256 KB of bfloat16 for a
// vocabulary of 128 k). Exponentials are computed twice, which is cheaper than keeping them.
#include "cpu/cross_entropy.h"

#include <cmath>
#include <limits>

#include "common/elementary.h"
#include "common/lanes.h"
#include "common/parallel.h"

namespace fastft {
namespace {

struct Sums {
  float exps;     // of exp(z - max)
  float products;  // of exp(z - max) * (z - max)
  float values;   // of z - max
};

FASTFT_INLINE float fold(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

template <class T, bool Capped>
struct CrossEntropy {
  T* logits;
  int64_t stride;
  const int64_t* labels;
  const float* scale;
  float* loss;
  float* log_prob;
  uint8_t* correct;
  float* entropy;
  int64_t cols;
  int64_t ignore_index;
  float smoothing;
  float cap;
  float z_loss;
  bool needs_gradient;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      T* x = logits + row * stride;
      if (labels[row] == ignore_index)
        skip(x, row);
      else
        compute(x, row, labels[row]);
    }
  }

  FASTFT_INLINE float value(T x) const { return Capped ? cap * tanh_of(widen(x) / cap) : widen(x); }

  FASTFT_INLINE void skip(T* x, int64_t row) const {
    loss[row] = log_prob[row] = entropy[row] = 0.0f;
    correct[row] = 0;
    if (needs_gradient)
      for (int64_t j = 0; j < cols; ++j) narrow(0.0f, x[j]);
  }

  FASTFT_INLINE void compute(T* x, int64_t row, int64_t label) const {
    const float max = largest(x);
    const Sums sums = add_up(x, max);
    const float log_sum = std::log(sums.exps), lse = max + log_sum;
    const bool inside = label >= 0 && label < cols;
    const float target = inside ? value(x[label]) : std::numeric_limits<float>::quiet_NaN();
    const float logp = (target - max) - log_sum;
    const float mean = sums.values / static_cast<float>(cols);
    float result = smoothing == 0.0f ? -logp : (smoothing - 1.0f) * logp + smoothing * (log_sum - mean);
    if (z_loss != 0.0f) result += z_loss * lse * lse;
    loss[row] = result;
    log_prob[row] = logp;
    entropy[row] = log_sum - sums.products / sums.exps;
    correct[row] = target == max && sums.exps == sums.exps && is_first(x, label, max);
    if (needs_gradient) differentiate(x, row, inside ? label : 0, max, sums.exps, lse);
  }

  FASTFT_INLINE float largest(const T* x) const {
    float lanes[kLanes];
    for (int k = 0; k < kLanes; ++k) lanes[k] = -std::numeric_limits<float>::infinity();
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) {
        const float v = widen(x[j + k]);
        lanes[k] = v > lanes[k] ? v : lanes[k];
      }
    }
    for (int k = 0; j + k < cols; ++k) lanes[k] = widen(x[j + k]) > lanes[k] ? widen(x[j + k]) : lanes[k];
    float max = lanes[0];
    for (int k = 1; k < kLanes; ++k) max = lanes[k] > max ? lanes[k] : max;
    return Capped ? cap * tanh_of(max / cap) : max;  // tanh is monotone
  }

  FASTFT_INLINE Sums add_up(const T* x, float max) const {
    float exps[kLanes] = {}, products[kLanes] = {}, values[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) {
        const float below = value(x[j + k]) - max, e = exp_of(below);
        exps[k] += e;
        products[k] += e > 0.0f ? e * below : 0.0f;  // not 0 * -inf
        values[k] += below;
      }
    }
    for (int k = 0; j + k < cols; ++k) {
      const float below = value(x[j + k]) - max, e = exp_of(below);
      exps[k] += e;
      products[k] += e > 0.0f ? e * below : 0.0f;
      values[k] += below;
    }
    return {fold(exps), fold(products), fold(values)};
  }

  FASTFT_INLINE bool is_first(const T* x, int64_t label, float max) const {
    for (int64_t j = 0; j < label; ++j)
      if (value(x[j]) == max) return false;
    return true;
  }

  FASTFT_INLINE void differentiate(T* x, int64_t row, int64_t label, float max, float sum, float lse) const {
    const float by = scale == nullptr ? 1.0f : scale[row];
    const float share = (1.0f + 2.0f * z_loss * lse) / sum, uniform = smoothing / static_cast<float>(cols);
    const float at_label = gradient(x[label], max, share, uniform + (1.0f - smoothing), by);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) narrow(gradient(x[j], max, share, uniform, by), x[j]);
    narrow(at_label, x[label]);
  }

  FASTFT_INLINE float gradient(T x, float max, float share, float wanted, float by) const {
    const float t = Capped ? tanh_of(widen(x) / cap) : 0.0f;
    const float z = Capped ? cap * t : widen(x);
    return (exp_of(z - max) * share - wanted) * (1.0f - t * t) * by;
  }
};

}  // namespace

void cross_entropy_forward(void* logits, int64_t stride, const int64_t* labels, const float* scale, float* loss,
                           float* log_prob, uint8_t* correct, float* entropy, int64_t rows, int64_t cols,
                           int64_t ignore_index, float label_smoothing, float softcap, float z_loss,
                           bool needs_gradient, DType dtype, int threads) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* x = static_cast<T*>(logits);
    const auto run = [&](auto body) { parallel_for(rows, rows * cols, threads, body); };
    if (softcap != 0.0f)
      run(CrossEntropy<T, true>{x, stride, labels, scale, loss, log_prob, correct, entropy, cols, ignore_index,
                                label_smoothing, softcap, z_loss, needs_gradient});
    else
      run(CrossEntropy<T, false>{x, stride, labels, scale, loss, log_prob, correct, entropy, cols, ignore_index,
                                 label_smoothing, softcap, z_loss, needs_gradient});
  });
}

}  // namespace fastft
