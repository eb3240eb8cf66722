// How the CPU kernels cut tensors into pieces, and how they read one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Two blocks of doubles stay within a 32 KiB L1 cache.
inline constexpr int64_t kBlock = 2048;
// The unit of work of one thread.
inline constexpr int64_t kChunk = 16 * kBlock;

inline int64_t chunk_count(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Calls body(offset, length) for each contiguous stretch of memory that holds elements first ... first + n - 1 of the
// flat order.
template <class Body>
void for_runs(const MatrixView& view, int64_t first, int64_t n, const Body& body) {
  int64_t row = first / view.cols;
  int64_t col = first % view.cols;
  while (n > 0) {
    const int64_t length = std::min(n, view.cols - col);
    body(row * view.row_stride + col, length);
    n -= length;
    ++row;
    col = 0;
  }
}

// Copies elements first ... first + n - 1 of the flat order and widens them exactly. A float64 view needs double.
void load(const MatrixView& view, int64_t first, int64_t n, float* to);
void load(const MatrixView& view, int64_t first, int64_t n, double* to);

// Does the same for tuned - base, clipped at +-theta; all values become NaN if theta is NaN. n <= kBlock.
void load_difference(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, float theta, float* to);
void load_difference(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, double theta,
                     double* to);

}  // namespace r_tsvm
