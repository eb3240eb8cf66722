// The mask of the elements that spread_select.h selects. The definition is r_tsvm_kernels/ops/spread_mask/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ.
// Output: contiguous, one byte for each element, owned by the caller, overwritten: 1 for the elements whose spread is
// above the threshold and for the first `ties` of those that are equal to it, else 0. Exact.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Uses at most `threads` threads, one for small tensors. Reads the inputs once.
void spread_mask_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count, double threshold, int64_t ties,
                     uint8_t* mask, int threads);

}  // namespace r_tsvm
