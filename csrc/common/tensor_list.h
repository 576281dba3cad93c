// Many tensors as one list of work: pieces of at most kPiece elements, numbered through all tensors.
//
// A tensor is a row of kFields integers: its number of elements, then the addresses that the kernel wants. Pieces depend on
// the sizes alone, so results do not depend on the thread count; kPiece is a multiple of every block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/isa.h"

namespace fastft {

constexpr int64_t kPiece = 16384;

template <int kFields>
class TensorList {
 public:
  TensorList(const int64_t* rows, int64_t count) : rows_(rows), first_(count + 1, 0) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t numel = rows[i * kFields];
      first_[i + 1] = first_[i] + (numel + kPiece - 1) / kPiece;
      elements_ += numel;
    }
  }

  int64_t pieces() const { return first_.back(); }
  int64_t elements() const { return elements_; }

  struct Piece {
    const int64_t* row;
    int64_t begin;  // in elements of that tensor
    int64_t size;

    // Address number `field` (1 ...), as elements of T; null where it is 0.
    template <class T>
    T* at(int field) const {
      return reinterpret_cast<T*>(row[field]);
    }
  };

  Piece piece(int64_t number) const {
    const int64_t tensor = std::upper_bound(first_.begin(), first_.end(), number) - first_.begin() - 1;
    const int64_t* row = rows_ + tensor * kFields;
    const int64_t begin = (number - first_[tensor]) * kPiece;
    return {row, begin, std::min(kPiece, row[0] - begin)};
  }

 private:
  const int64_t* rows_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0;
};

}  // namespace fastft
