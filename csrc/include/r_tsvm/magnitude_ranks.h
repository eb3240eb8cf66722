// Ranks of the magnitudes within each row. The definition is r_tsvm_kernels/ops/magnitude_ranks/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// Row r holds the elements r * cols ... (r + 1) * cols - 1 of the flat order, whatever the rows of the views are;
// 1 <= cols < 2^31 divides the number of elements. With a base the magnitudes are those of x - base, formed in float32,
// or in float64 if either input is float64.
// Outputs, owned by the caller, overwritten: the ranks, contiguous: 0 for the smallest magnitude of the row, of equal
// ones the lower index has the higher rank; and the number of NaN and infinite values; if that is not 0 the ranks mean
// nothing. Exact, so the same for every number of threads and every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct MagnitudeRanksOutput {
  int32_t* ranks;
  int64_t* nonfinite;
};

// `base` may be null. Uses at most `threads` threads, one for small tensors; a row is sorted by one thread. Each thread
// takes memory for two or three copies of a row. Reads the inputs once.
void magnitude_ranks_cpu(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                         int threads);

}  // namespace r_tsvm
