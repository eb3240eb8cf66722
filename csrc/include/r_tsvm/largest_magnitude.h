// The largest magnitude of a tensor, and whether a value is NaN or infinite, at the speed of reading it.
#pragma once

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Returns NaN if a value is NaN, and 0 for an empty view. Uses at most `threads` threads, and one for small tensors.
double largest_magnitude_cpu(const MatrixView& x, int threads);

}  // namespace r_tsvm
