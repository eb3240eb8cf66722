// Task vectors clipped and pruned in their own memory. The definition is
// r_tsvm_kernels/ops/reweight_prune_inplace/reference.py.
//
// Per task: a contiguous matrix of float32 or float64 that is overwritten, the bound `theta` >= 0 of the magnitudes
// (infinity clips nothing, NaN makes the task NaN) and the number of elements that are kept, 0 <= keep <= elements; the
// matrices do not overlap. Output, owned by the caller, overwritten: the number of NaN and infinite values met in the
// clipped matrices that are to be pruned; if any is not 0, no matrix has been changed.
// Exact, so the same for every number of threads and every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct InplacePruneTask {
  void* matrix;
  double theta;
  int64_t keep;
  int64_t* nonfinite;
};

// Uses at most `threads` threads, one for small tensors. Reads a matrix three or four times (float64: five or six) and
// writes it once.
void reweight_prune_inplace_cpu(const InplacePruneTask* tasks, int64_t count, int64_t elements, ElementType type,
                                int threads);

}  // namespace r_tsvm
