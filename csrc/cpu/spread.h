// The spread of task vectors, block by block.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Writes what task_spread_cpu does for the elements first ... first + n - 1.
void spread_of(const MatrixView& base, const MatrixView* tuned, int64_t count, int64_t first, int64_t n,
               double* spread);

}  // namespace r_tsvm
