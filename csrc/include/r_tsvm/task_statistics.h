// Statistics of a = |tuned[t] - base| for T tasks. The definition is r_tsvm_kernels/ops/task_statistics/reference.py.
//
// Inputs: views of equal element count; element types may differ; row strides may differ. Differences are formed in
// float32, or in float64 if any input is float64. Sums are float64.
// Outputs: T entries each, owned by the caller, overwritten. On CUDA they lie on `device`.
// Order of summation: fixed blocks of the flat, logical order, merged in a fixed order. The bits depend on the values
// and the element count alone: not on strides, on the number of threads, or on the instruction set.
// NaN: a task with NaN has mean, sd, max and outlier mass NaN; theta is NaN unless sigma is infinite.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

struct TaskStatisticsOutput {
  double* mean;
  double* sd;
  double* max;
  int64_t* zeros;
  double* theta;
  double* outlier_mass;
  int64_t* small;
};

// Uses at most `threads` threads, one for small tensors.
void task_statistics_cpu(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
                         const TaskStatisticsOutput& output, int threads);

// Bytes of device memory, 8-byte aligned, that task_statistics_cuda needs; the content does not matter.
int64_t task_statistics_cuda_workspace(int64_t elements, int64_t tasks);

// The views must be contiguous. Queues the work on `stream` (a cudaStream_t) of `device` and returns; never waits for
// the device.
void task_statistics_cuda(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
                          const TaskStatisticsOutput& output, void* workspace, int device, void* stream);

}  // namespace r_tsvm
