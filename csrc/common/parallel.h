// Work split into fixed chunks, shared out over OpenMP threads.
//
// The chunks depend on the problem alone, so whatever is reduced per chunk has the same value for any thread count.
// With GCC the threads are those of torch's own pool: its libgomp is already loaded and serves this library too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"

namespace fastft {

constexpr int64_t kElementsPerThread = 32768;  // below this, waking a thread costs more than its work

// Calls body(begin, end) over [0, count), vectorised for the active instruction set. `elements` is the size of the work.
template <class Body>
void parallel_for(int64_t count, int64_t elements, int threads, const Body& body) {
  const auto run = for_active_isa<Body>();
  const int64_t useful = std::min(count, 1 + elements / kElementsPerThread);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  if (parts == 1) return run(body, 0, count);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) run(body, count * part / parts, count * (part + 1) / parts);
}

}  // namespace fastft
