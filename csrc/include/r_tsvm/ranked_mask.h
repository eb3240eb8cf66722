// A random mask by the ranks of magnitudes within rows. The definition is
// r_tsvm_kernels/ops/ranked_mask/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// Rows and ranks are those of r_tsvm/magnitude_ranks.h. `thresholds` has one number for each rank, from 0 (never) to
// 2^32 (always); the numbers do not fall.
// Outputs, owned by the caller, overwritten: one byte per element, and the number of NaN and infinite values. The byte
// is 1 if the element's word (r_tsvm/philox.h) is below the threshold of its rank, else 0. The mask is meaningless if
// the number is not 0. Results are exact, and so the same for every number of threads and every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/philox.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct RankedMaskOutput {
  uint8_t* mask;
  int64_t* nonfinite;
};

// `base` may be null; `drawn` gives seed and substream. Uses at most `threads` threads, and one for small tensors. Each
// thread needs memory for a few copies of a row. Reads the inputs once.
void ranked_mask_cpu(const MatrixView& x, const MatrixView* base, const int64_t* thresholds, int64_t cols,
                     const RandomMask& drawn, const RankedMaskOutput& output, int threads);

}  // namespace r_tsvm
