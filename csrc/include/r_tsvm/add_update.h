// base + alpha * update; where alpha * update is 0 the base comes back bit for bit. The definition is
// r_tsvm_kernels/ops/add_update/reference.py.
//
// Inputs: contiguous views of equal element count on `device`; element types may differ.
// Output: contiguous, owned by the caller, overwritten; float64 if any input is float64, else float32, which is also
// what everything is computed in.
#pragma once

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Queues the work on `stream` (a cudaStream_t) of `device` and returns.
void add_update_cuda(const MatrixView& base, const MatrixView& update, double alpha, void* output, int device,
                     void* stream);

}  // namespace r_tsvm
