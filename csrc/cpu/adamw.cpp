// AdamW with float state: weights, moments and the rounded copy are read and written once.
#include "common/adamw.h"

#include <cstring>

#include "common/parallel.h"
#include "common/tensor_list.h"
#include "cpu/adamw.h"

namespace fastft {
namespace {

using Tensors = TensorList<6>;

template <class G, class C>
struct AdamW {
  const Tensors& tensors;
  AdamWStep step;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t number = begin; number < end; ++number) {
      const Tensors::Piece piece = tensors.piece(number);
      float* w = piece.at<float>(1) + piece.begin;
      const G* g = piece.at<G>(2);
      C* copy = piece.at<C>(3);
      float* m = piece.at<float>(4) + piece.begin;
      float* v = piece.at<float>(5) + piece.begin;
      if (g != nullptr && copy != nullptr)
        update<true, true>(w, g + piece.begin, copy + piece.begin, m, v, piece.size);
      else if (g != nullptr)
        update<true, false>(w, g + piece.begin, copy, m, v, piece.size);
      else if (copy != nullptr)
        update<false, true>(w, g, copy + piece.begin, m, v, piece.size);
      else
        update<false, false>(w, g, copy, m, v, piece.size);
    }
  }

  template <bool HasGradient, bool HasCopy>
  FASTFT_INLINE void update(float* w, const G* g, C* copy, float* m, float* v, int64_t size) const {
    const AdamWStep s = step;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      float root;
      w[j] = adamw_element(w[j], HasGradient ? widen(g[j]) : 0.0f, m[j], v[j], root, s);
      if (HasCopy) narrow(w[j], copy[j]);
    }
  }
};

// Squares are summed in double: no gradient is so large that its square overflows, and none is lost.
template <class T>
struct SquareSum {
  const TensorList<2>& tensors;
  double* partial;

  FASTFT_INLINE void operator()(int64_t begin, int64_t end) const {
    constexpr int kSums = 32;
    for (int64_t number = begin; number < end; ++number) {
      const TensorList<2>::Piece piece = tensors.piece(number);
      const T* x = piece.at<T>(1) + piece.begin;
      double sums[kSums] = {};
      int64_t j = 0;
      for (; j + kSums <= piece.size; j += kSums) {
#pragma omp simd
        for (int k = 0; k < kSums; ++k) {
          const double value = widen(x[j + k]);
          sums[k] += value * value;
        }
      }
      for (int k = 0; j + k < piece.size; ++k) sums[k] += static_cast<double>(widen(x[j + k])) * widen(x[j + k]);
      for (int half = kSums / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
      partial[number] = sums[0];
    }
  }
};

}  // namespace

void adamw(const int64_t* rows, int64_t count, const float* scalars, DType grad_dtype, DType copy_dtype, int threads) {
  const Tensors tensors(rows, count);
  AdamWStep step;
  std::memcpy(&step, scalars, sizeof step);
  with_type(grad_dtype, [&](auto grad) {
    with_type(copy_dtype, [&](auto copy) {
      using Body = AdamW<typename decltype(grad)::type, typename decltype(copy)::type>;
      parallel_for(tensors.pieces(), tensors.elements(), threads, Body{tensors, step});
    });
  });
}

void square_sum(const int64_t* rows, int64_t count, double* sum, DType dtype, int threads) {
  const TensorList<2> tensors(rows, count);
  std::vector<double> partial(tensors.pieces());
  with_type(dtype, [&](auto type) {
    parallel_for(tensors.pieces(), tensors.elements(), threads,
                 SquareSum<typename decltype(type)::type>{tensors, partial.data()});
  });
  *sum = 0.0;
  for (double value : partial) *sum += value;
}

}  // namespace fastft
