// Exact selection of the largest magnitudes. The definition is r_tsvm_kernels/ops/magnitude_select/reference.py.
//
// Inputs: a view of x, and optionally one of a base with as many elements; element types and row strides may differ.
// With a base the magnitudes are those of x - base, formed in float32, or in float64 if either input is float64.
// One number of survivors or more, each from 1 to the number of elements.
// Outputs: one entry for each number, owned by the caller, overwritten. If `nonfinite`, the number of NaN and infinite
// values, is not 0, the others mean nothing. Exact, so the same for every number of threads and every instruction set.
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
// once, float32 twice, float64 four times.
void magnitude_select_cpu(const MatrixView& x, const MatrixView* base, const int64_t* keep, int64_t count,
                          const MagnitudeSelectOutput& output, int threads);

}  // namespace r_tsvm
