// The Gram matrix of T task vectors. The definition is r_tsvm_kernels/ops/task_gram/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ; optionally a base that is subtracted,
// and a mask.
// Output: (T, T), row-major, owned by the caller, overwritten. Differences and products are formed in double and summed
// in an order that depends on the number of elements alone. The bits are the same for every number of threads, for all
// strides and on every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// `base` may be null. `mask` may be null, else it is contiguous, and products are summed where it is not 0. Uses at
// most `threads` threads, and one for small tensors. Reads the inputs once.
void task_gram_cpu(const MatrixView* tuned, int64_t count, const MatrixView* base, const uint8_t* mask, double* gram,
                   int threads);

}  // namespace r_tsvm
