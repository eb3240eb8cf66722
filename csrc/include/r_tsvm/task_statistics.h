// Statistics of a = |tuned[t] - base| for T tasks. The definition is r_tsvm_kernels/ops/task_statistics/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ. Differences are formed in float32, or
// in float64 if any input is float64. Sums are float64.
// Outputs: T entries each, owned by the caller, overwritten.
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

}  // namespace r_tsvm
