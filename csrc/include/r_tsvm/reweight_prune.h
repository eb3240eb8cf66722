// Task vectors with their outliers clipped and their small elements dropped. The definition is
// r_tsvm_kernels/ops/reweight_prune/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ. Per task: the bound `theta` >= 0 of
// the magnitudes (infinity clips nothing, NaN makes the task NaN) and the number of elements that are kept,
// 0 <= keep <= elements.
// Outputs, owned by the caller, overwritten: per task a contiguous matrix of float32, or of float64 if any input is
// float64, and the number of NaN and infinite values met while pruning; where that is not 0 the matrix means nothing.
// Exact, so the same for every number of threads and every instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct PruneTask {
  MatrixView tuned;
  double theta;
  int64_t keep;
  void* matrix;
  int64_t* nonfinite;
};

// Uses at most `threads` threads, one for small tensors. Usually reads the inputs once; again, in part or a few times,
// where a sample of them misleads. Needs a few per cent of the size of the outputs as memory of its own, and may ask
// the system for huge pages under the outputs.
void reweight_prune_cpu(const MatrixView& base, const PruneTask* tasks, int64_t count, int threads);

}  // namespace r_tsvm
