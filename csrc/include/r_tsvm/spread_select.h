// Exact selection of the elements on which tasks differ most. The definition is
// r_tsvm_kernels/ops/spread_select/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ. The spread of an element is that of
// task_spread.h, in double; it is never stored.
// Output, owned by the caller, overwritten: one threshold, infinity if nothing is kept, and its ties. They are
// meaningless if `nonfinite`, the number of elements whose spread is NaN, is not 0. Results are exact, and so the same
// for every number of threads and every instruction set.
#pragma once

#include <cstdint>
#include <functional>

#include "r_tsvm/magnitude_select.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// keep_of is called once, with the number of elements whose spread is not 0, unless `nonfinite` is not 0. It returns
// how many survive, at most so many. Uses at most `threads` threads, one for small tensors. Reads the inputs twice, or
// four times where an eighth of the spreads share their upper 16 bits.
void spread_select_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count,
                       const std::function<int64_t(int64_t)>& keep_of, const MagnitudeSelectOutput& output,
                       int threads);

}  // namespace r_tsvm
