#include <algorithm>

#include "r_tsvm/reweight_prune.h"
#include "selection.h"
#include "ties.cuh"

namespace r_tsvm {
namespace {

constexpr char kOp[] = "reweight_prune";
constexpr int kMaxTasks = 16;  // of one launch

struct Tasks {
  PruneTaskCuda task[kMaxTasks];
  int count;
};

template <class Real>
__global__ void __launch_bounds__(kThreads, 4)
    tie_kernel(const __grid_constant__ MatrixView base, const __grid_constant__ Tasks tasks,
               const __grid_constant__ TieRules rules, int64_t elements) {
  for (int64_t slice = blockIdx.x; slice < rules.slices; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int t) -> const MatrixView& { return tasks.task[t].tuned; };
    const auto is_tied = [&](int t) { return tasks.task[t].selection >= 0 && is_open(rules, tasks.task[t].selection); };
    Real origin[kItems];
    for_differences(base, tasks.count, is_tied, view_of, index, elements, origin, [&](int t, Real(&values)[kItems]) {
      clip(tasks.task[t].theta, values);
      count_ties(rules, tasks.task[t].selection, values, slice, elements);
    });
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    prune_kernel(const __grid_constant__ MatrixView base, const __grid_constant__ Tasks tasks,
                 const __grid_constant__ TieRules rules, int64_t elements) {
  for (int64_t slice = blockIdx.x; slice < rules.slices; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int t) -> const MatrixView& { return tasks.task[t].tuned; };
    Real origin[kItems];
    for_differences(base, tasks.count, Every(), view_of, index, elements, origin, [&](int t, Real(&values)[kItems]) {
      const PruneTaskCuda& task = tasks.task[t];
      clip(task.theta, values);
      if (task.selection >= 0) {
        bool selected[kItems];
        select(rules, task.selection, values, slice, selected);
#pragma unroll
        for (int j = 0; j < kItems; ++j) values[j] = selected[j] ? values[j] : Real{0};
      }
      store_four(values, static_cast<Real*>(task.matrix), index, elements);
    });
  }
}

template <class Real>
void launch(const Queue& queue, const MatrixView& base, const Tasks& tasks, const TieRules& rules) {
  const int64_t elements = element_count(tasks.task[0].tuned);
  launch_kernel(queue, "prune_kernel", rules.slices, kThreads, 0, prune_kernel<Real>, base, tasks, rules, elements);
}

template <class Real>
void launch_ties(const Queue& queue, const MatrixView& base, const Tasks& tasks, const TieRules& rules) {
  const int64_t elements = element_count(tasks.task[0].tuned);
  launch_kernel(queue, "tie_kernel", rules.slices, kThreads, 0, tie_kernel<Real>, base, tasks, rules, elements);
}

void check_contiguous(const MatrixView& base, const PruneTaskCuda* tasks, int64_t count) {
  bool contiguous = is_contiguous(base);
  for (int64_t t = 0; t < count; ++t) contiguous = contiguous && is_contiguous(tasks[t].tuned);
  if (!contiguous) throw std::runtime_error("reweight_prune: the CUDA kernel reads contiguous tensors only");
}

}  // namespace

int64_t reweight_prune_cuda_workspace(int64_t elements, int64_t selections) {
  const int64_t quotas = selections * slice_count(elements) * static_cast<int64_t>(sizeof(int));
  return std::max(quotas, select_magnitudes_workspace());
}

void reweight_prune_select_cuda(const MatrixView& base, const PruneTaskCuda* tasks, int64_t count, bool in_float64,
                                const PruneSelections& selections, void* workspace, int device, void* stream) {
  if (count == 0) return;
  check_contiguous(base, tasks, count);
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  // Later launches reuse the workspace: they follow on the same stream.
  for (int64_t first = 0; first < count; first += kMaxSelections) {
    Magnitudes of{};
    KeepCounts keep{};
    of.base = base;
    of.tensors = static_cast<int>(std::min<int64_t>(kMaxSelections, count - first));
    of.keeps = 1;
    of.in_float64 = in_float64;
    for (int i = 0; i < of.tensors; ++i) {
      of.tensor[i] = tasks[first + i].tuned;
      of.theta[i] = tasks[first + i].theta;
      of.nonfinite[i] = selections.nonfinite + first + i;
      keep.keep[i] = tasks[first + i].keep;
    }
    select_magnitudes(queue, of, keep,
                      Found{selections.threshold + first, selections.ties + first, selections.tied + first}, workspace);
  }
}

void reweight_prune_apply_cuda(const MatrixView& base, const PruneTaskCuda* tasks, int64_t count, bool in_float64,
                               const PruneSelections& selections, int64_t selection_count, void* workspace, int device,
                               void* stream) {
  if (count == 0 || element_count(tasks[0].tuned) == 0) return;
  check_contiguous(base, tasks, count);
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  const TieRules rules{selections.threshold, selections.ties, selections.tied, static_cast<int*>(workspace),
                       slice_count(element_count(tasks[0].tuned))};
  const auto for_batches = [&](const auto& launch_batch) {
    for (int64_t first = 0; first < count; first += kMaxTasks) {
      Tasks batch{};
      batch.count = static_cast<int>(std::min<int64_t>(kMaxTasks, count - first));
      std::copy(tasks + first, tasks + first + batch.count, batch.task);
      launch_batch(batch);
    }
  };
  if (selection_count > 0) {
    clear_ties(queue, rules, selection_count);
    for_batches([&](const Tasks& batch) {
      (in_float64 ? launch_ties<double> : launch_ties<float>)(queue, base, batch, rules);
    });
    launch_kernel(queue, "quota_kernel", selection_count, kQuotaThreads, 0, quota_kernel, rules);
  }
  for_batches([&](const Tasks& batch) { (in_float64 ? launch<double> : launch<float>)(queue, base, batch, rules); });
}

}  // namespace r_tsvm
