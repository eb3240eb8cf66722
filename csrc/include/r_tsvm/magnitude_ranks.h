// Ranks of the magnitudes within each row. The definition is r_tsvm_kernels/ops/magnitude_ranks/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// Row r holds the elements r * cols ... (r + 1) * cols - 1 of the flat order, whatever rows the views have; 1 <= cols <
// 2^31 divides the number of elements. With a base the magnitudes are those of x - base, formed in float32, or in
// float64 if either input is float64.
// Outputs, owned by the caller, overwritten: the ranks, contiguous, and the number of NaN and infinite values. Rank 0
// is the smallest magnitude of the row; of equal magnitudes the lower index has the higher rank. The ranks are
// meaningless if the number is not 0. Results are exact, and so the same for every number of threads and every
// instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct MagnitudeRanksOutput {
  int32_t* ranks;
  int64_t* nonfinite;
};

// `base` may be null. Uses at most `threads` threads, and one for small tensors. One thread sorts a row, with memory
// for two or three copies of it. Reads the inputs once.
void magnitude_ranks_cpu(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                         int threads);

// Bytes of device memory, 8-byte aligned, that magnitude_ranks_cuda needs; the content does not matter. Long rows need
// 16 bytes (24 for float64) per element of the rows that are sorted at the same time.
int64_t magnitude_ranks_cuda_workspace(int64_t rows, int64_t cols, bool in_float64, int device);

// The views must be contiguous. Queues the work on `stream` (a cudaStream_t) of `device`, which holds the outputs, and
// returns without waiting for the device. One thread block sorts a row, so a few long rows leave most of the device
// idle.
void magnitude_ranks_cuda(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                          void* workspace, int device, void* stream);

}  // namespace r_tsvm
