// Exact selection of the largest magnitudes. The definition is r_tsvm_kernels/ops/magnitude_select/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// With a base the magnitudes are those of x - base, formed in float32, or in float64 if either input is float64.
// `keep` holds one or more numbers of survivors, each from 1 to the number of elements.
// Outputs, owned by the caller, overwritten: one entry for each number of survivors. They are meaningless if
// `nonfinite`, the number of NaN and infinite values, is not 0. Results are exact, and so the same for every number of
// threads and every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct MagnitudeSelectOutput {
  double* threshold;   // the keep-th largest magnitude
  int64_t* ties;       // how many elements of exactly this magnitude are among the first `keep`
  int64_t* nonfinite;  // one entry
};

// `base` may be null. Uses at most `threads` threads, one for small tensors. 16-bit floats without a base are read
// once, others twice, or float64 four times where an eighth of the magnitudes share their upper 16 bits.
void magnitude_select_cpu(const MatrixView& x, const MatrixView* base, const int64_t* keep, int64_t count,
                          const MagnitudeSelectOutput& output, int threads);

// Bytes of device memory, 8-byte aligned, that magnitude_select_cuda needs; the content does not matter.
int64_t magnitude_select_cuda_workspace();

// Finds keep[0 ... count - 1] together: `output` has `count` thresholds and ties, on the device, and one `nonfinite`.
// The views must be contiguous. Queues the work on `stream` (a cudaStream_t) of `device` and returns without waiting
// for the device. Reads 16-bit floats without a base once if a block has 128 KiB of shared memory, and else twice;
// float32 three times; float64 six times.
void magnitude_select_cuda(const MatrixView& x, const MatrixView* base, const int64_t* keep, int64_t count,
                           const MagnitudeSelectOutput& output, void* workspace, int device, void* stream);

}  // namespace r_tsvm
