// Counts of a digit of the magnitudes' bit patterns. The definition is
// r_tsvm_kernels/ops/magnitude_histogram/reference.py.
//
// Inputs: contiguous views of x, and optionally of a base with as many elements; element types may differ. With a base
// the magnitudes are those of x - base. Patterns are those of float32 (31 bits), or of float64 (63 bits) if either
// input is float64. The digit has `bits` bits, 1 to 11, with `shift` bits below it; it is counted where the bits above
// it are `prefix`. Output: 2^bits counts, owned by the caller, overwritten. Exact.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// `base` may be null. Queues the work on `stream` (a cudaStream_t) of `device` and returns; never waits for the device.
void magnitude_histogram_cuda(const MatrixView& x, const MatrixView* base, int bits, uint64_t prefix, int shift,
                              int64_t* counts, int device, void* stream);

}  // namespace r_tsvm
