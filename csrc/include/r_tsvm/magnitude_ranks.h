// Ranks of magnitudes within rows. The definition is r_tsvm_kernels/ops/magnitude_ranks/reference.py.
//
// Inputs: contiguous views of x, and optionally of a base with as many elements; element types may differ. With a base
// the magnitudes are those of x - base, formed in float32, or in float64 if either input is float64. The elements are
// rows of `cols`, 1 <= cols < 2^31.
// Outputs, owned by the caller, overwritten: the rank of each element, 0 for the smallest of its row, of equal ones the
// lower index has the higher rank; and the number of NaN and infinite values, where the ranks mean nothing if it is not
// 0. Exact.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Bytes of device memory, 8-byte aligned, that magnitude_ranks_cuda needs; the content does not matter. For long rows
// they are 16 bytes (24 for float64) per element of the rows that are sorted at the same time.
int64_t magnitude_ranks_cuda_workspace(int64_t rows, int64_t cols, bool in_float64, int device);

// `base` may be null. Queues the work on `stream` (a cudaStream_t) of `device` and returns; never waits for the device.
// One thread block sorts a row: few long rows leave most of the device idle.
void magnitude_ranks_cuda(const MatrixView& x, const MatrixView* base, int64_t cols, int32_t* ranks, int64_t* nonfinite,
                          void* workspace, int device, void* stream);

}  // namespace r_tsvm
