// Counts of one digit of the magnitudes. The definition is r_tsvm_kernels/ops/magnitude_histogram/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// The magnitudes are those of x or x - base in float32, or in float64 if either input is float64.
// Output: 2^bits counts, owned by the caller, overwritten. Exact, so the same for every number of threads and every
// instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Of the bit patterns (31 bits, 63 in float64) that begin with `prefix`, the `bits` after it; `shift` more follow.
struct Digit {
  int bits;  // 1 to 11
  int64_t prefix;
  int shift;
};

// `base` may be null. Uses at most `threads` threads, one for small tensors. Reads the inputs once.
void magnitude_histogram_cpu(const MatrixView& x, const MatrixView* base, const Digit& digit, int64_t* counts,
                             int threads);

}  // namespace r_tsvm
