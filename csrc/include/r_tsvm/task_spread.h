// The sum of squared deviations of T task vectors from their mean, for each element. The definition is
// r_tsvm_kernels/ops/task_spread/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ.
// Output: contiguous, owned by the caller, overwritten. Differences are formed in float, or in double if any input is
// float64. Everything else is in double. Sums run over the tasks from first to last, so the bits depend on the values
// alone.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Uses at most `threads` threads, one for small tensors. Reads the inputs once.
void task_spread_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count, double* spread, int threads);

}  // namespace r_tsvm
