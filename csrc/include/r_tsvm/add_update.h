// Base plus update. The definition is r_tsvm_kernels/ops/add_update/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ. float64 if one is float64, else
// float32 is computed in.
// Output: contiguous, of any element type, owned by the caller, overwritten. The bits do not depend on the number of
// threads.
#pragma once

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Uses at most `threads` threads, one for small tensors. Reads the inputs once.
void add_update_cpu(const MatrixView& base, const MatrixView& update, double alpha, void* output, ElementType type,
                    int threads);

}  // namespace r_tsvm
