// Task vectors with their outliers clipped and their small elements dropped. The definition is
// r_tsvm_kernels/ops/reweight_prune/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ. Per task: the bound `theta` >= 0 of
// the magnitudes (infinity clips nothing, NaN makes the task NaN) and the number of elements that are kept,
// 0 <= keep <= elements.
// Outputs, owned by the caller, overwritten: per task a contiguous matrix of float32, or of float64 if any input is
// float64, and the number of NaN and infinite values met while pruning. The matrix is meaningless if the number is not
// 0. Results are exact, and so the same for every number of threads and every instruction set.
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

// Uses at most `threads` threads, and one for small tensors. Usually reads the inputs once. If a sample of them
// misleads, reads a part of them, or all of them, a few times more. Allocates a few per cent of the size of the
// outputs, and may ask the system to back the outputs with huge pages.
void reweight_prune_cpu(const MatrixView& base, const PruneTask* tasks, int64_t count, int threads);

// On CUDA, pruning has two steps. Between them the caller can refuse values that are not finite.
struct PruneTaskCuda {
  MatrixView tuned;
  const double* theta;  // on the device; null clips nothing
  int64_t keep;         // for the first step
  void* matrix;         // for the second step
  int selection;        // for the second step: which of the selections is this task's; negative if it is not pruned
};

// Arrays on the device.
struct PruneSelections {
  double* threshold;   // the keep-th largest magnitude, infinity where keep is 0
  int64_t* ties;       // how many elements of this magnitude are kept
  int64_t* tied;       // how many there are
  int64_t* nonfinite;  // where this is not 0 the others mean nothing
};

// Bytes of device memory, 8-byte aligned, that each step needs; the content does not matter.
int64_t reweight_prune_cuda_workspace(int64_t elements, int64_t selections);

// The views must be contiguous and not empty. `in_float64` says whether task vectors and matrices are float64, not
// float32; the tasks of one step alone need not determine this. Both steps queue their work on `stream` (a
// cudaStream_t) of `device` and return without waiting for the device. The first step makes selection i for task i.
void reweight_prune_select_cuda(const MatrixView& base, const PruneTaskCuda* tasks, int64_t count, bool in_float64,
                                const PruneSelections& selections, void* workspace, int device, void* stream);
void reweight_prune_apply_cuda(const MatrixView& base, const PruneTaskCuda* tasks, int64_t count, bool in_float64,
                               const PruneSelections& selections, int64_t selection_count, void* workspace, int device,
                               void* stream);

}  // namespace r_tsvm
