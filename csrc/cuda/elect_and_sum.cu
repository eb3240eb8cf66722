#include <algorithm>

#include "r_tsvm/elect_and_sum.h"
#include "ties.cuh"

namespace r_tsvm {
namespace {

constexpr char kOp[] = "elect_and_sum";
constexpr int kBatch = 16;

template <class Real>
struct Task {
  MatrixView view;
  RandomMask sampled;
  RankedSelection ranked;
  const uint8_t* mask;
  int kept;
  int dropped;
  Real weight;
  double factor;
};

template <class Real>
struct Batch {
  Task<Real> task[kBatch];
};

// Any number of tasks. They are passed as arguments of launches, which never wait, unlike copies from pageable memory.
template <class Real>
__global__ void put_kernel(const __grid_constant__ Batch<Real> batch, int count, Task<Real>* tasks) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < count) tasks[t] = batch.task[t];
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 4)
    tie_kernel(const __grid_constant__ MatrixView base, const Task<Real>* tasks, int count,
               const __grid_constant__ TieRules rules, int64_t elements) {
  for (int64_t slice = blockIdx.x; slice < rules.slices; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int t) -> const MatrixView& { return tasks[t].view; };
    const auto counts = [&](int rule) { return rule >= 0 && is_open(rules, rule); };
    const auto is_tied = [&](int t) { return counts(tasks[t].kept) || counts(tasks[t].dropped); };
    Real origin[kItems];
    for_differences(base, count, is_tied, view_of, index, elements, origin, [&](int t, Real(&values)[kItems]) {
      if (counts(tasks[t].kept)) count_ties(rules, tasks[t].kept, values, slice, elements);
      if (counts(tasks[t].dropped)) count_ties(rules, tasks[t].dropped, values, slice, elements);
    });
  }
}

// One factor for all differences, or one for each rank.
template <class Real>
__device__ const double* factors(const Task<Real>& task) {
  return task.ranked.ranks != nullptr ? task.ranked.factors : &task.factor;
}

// Sets the differences of a task to 0 where they do not survive; the others are multiplied by factors(task)[place].
template <class Real>
__device__ void sparsify(const Task<Real>& task, const TieRules& rules, int64_t slice, int64_t elements,
                         Real (&values)[kItems], int (&place)[kItems]) {
  bool survives[kItems], selected[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    survives[j] = true;
    place[j] = 0;
  }
  if (task.kept >= 0) {
    select(rules, task.kept, values, slice, selected);
#pragma unroll
    for (int j = 0; j < kItems; ++j) survives[j] = survives[j] && selected[j];
  }
  if (task.dropped >= 0) {
    select(rules, task.dropped, values, slice, selected);
#pragma unroll
    for (int j = 0; j < kItems; ++j) survives[j] = survives[j] && !selected[j];
  }
  const int64_t index = first_item(slice);
  if (task.mask != nullptr) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) survives[j] = survives[j] && index + j < elements && task.mask[index + j] != 0;
  }
  if (task.ranked.ranks != nullptr) {
    uint32_t words[kItems];
    random_words(task.sampled, index, words);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      place[j] = index + j < elements ? task.ranked.ranks[index + j] : 0;
      survives[j] = survives[j] && static_cast<int64_t>(words[j]) < task.ranked.thresholds[place[j]];
    }
  } else if (task.sampled.threshold < (uint64_t{1} << 32)) {
    uint32_t words[kItems];
    random_words(task.sampled, index, words);
#pragma unroll
    for (int j = 0; j < kItems; ++j) survives[j] = survives[j] && words[j] < task.sampled.threshold;
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) values[j] = survives[j] ? values[j] : Real{0};
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ MatrixView base, const Task<Real>* tasks, int count,
               const __grid_constant__ TieRules rules, Real alpha, int64_t elements, void* output, ElementType type) {
  for (int64_t slice = blockIdx.x; slice < rules.slices; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int t) -> const MatrixView& { return tasks[t].view; };
    Real origin[kItems], sum[kItems] = {};
    for_differences(base, count, Every(), view_of, index, elements, origin, [&](int t, Real(&values)[kItems]) {
      int place[kItems];
      sparsify(tasks[t], rules, slice, elements, values, place);
      const double* const factor = factors(tasks[t]);
#pragma unroll
      for (int j = 0; j < kItems; ++j) sum[j] += static_cast<Real>(factor[place[j]]) * values[j];
    });
    add_step(origin, alpha, sum);
    store_as(type, origin, output, index, elements);
  }
}

// Both outcomes of an election are summed, so that one pass over the tasks is enough. NaN is on both sides, so that it
// is never lost.
template <class Real>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 4 : 2)
    elect_kernel(const __grid_constant__ MatrixView base, const Task<Real>* tasks, int count,
                 const __grid_constant__ TieRules rules, Election election, bool normalize, Real least, Real alpha,
                 int64_t elements, void* output, ElementType type) {
  for (int64_t slice = blockIdx.x; slice < rules.slices; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int t) -> const MatrixView& { return tasks[t].view; };
    Real origin[kItems], elected[kItems];
    double votes[kItems] = {};
    Real positive[kItems] = {}, negative[kItems] = {}, positive_weight[kItems] = {}, negative_weight[kItems] = {};
    for_differences(base, count, Every(), view_of, index, elements, origin, [&](int t, Real(&values)[kItems]) {
      int place[kItems];
      sparsify(tasks[t], rules, slice, elements, values, place);
      const double* const factor = factors(tasks[t]);
      const Real weight = tasks[t].weight;
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const Real value = static_cast<Real>(factor[place[j]]) * values[j];
        const Real voter = election == Election::kUnweighted ? values[j] : value;
        const int sign = (voter > 0 ? 1 : 0) - (voter < 0 ? 1 : 0);
        const double scale = election == Election::kUnweighted ? 1 : factor[place[j]];
        const double ballot = election == Election::kCount ? sign : scale * values[j];
        votes[j] += ballot < 0 ? kAgainst * ballot : ballot;
        positive[j] += voter < 0 ? Real{0} : value;
        negative[j] += voter > 0 ? Real{0} : value;
        if (voter > 0) positive_weight[j] += weight;
        if (voter < 0) negative_weight[j] += weight;
      }
    });
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const bool won = votes[j] >= 0;
      const Real weight = won ? positive_weight[j] : negative_weight[j];
      elected[j] = won ? positive[j] : negative[j];
      if (normalize) elected[j] /= fabs(weight) <= least ? Real{1} : weight;
    }
    add_step(origin, alpha, elected);
    store_as(type, origin, output, index, elements);
  }
}

template <class Real>
void run(const Queue& queue, const MatrixView& base, const MatrixView* tuned, const ElectTaskCuda* rules, int64_t count,
         const ElectOptions& options, const ElectSelections& selections, void* output, ElementType type,
         void* workspace) {
  const int64_t elements = element_count(base);
  const int64_t slices = slice_count(elements);
  const int tasks_count = static_cast<int>(count);
  Task<Real>* tasks = static_cast<Task<Real>*>(workspace);
  const TieRules ties{selections.threshold, selections.ties, nullptr, reinterpret_cast<int*>(tasks + count), slices};
  for (int64_t first = 0; first < count; first += kBatch) {
    Batch<Real> batch{};
    const int size = static_cast<int>(std::min<int64_t>(kBatch, count - first));
    for (int i = 0; i < size; ++i) {
      const ElectTaskCuda& rule = rules[first + i];
      batch.task[i] = Task<Real>{tuned[first + i],
                                 rule.sampled,
                                 rule.ranked,
                                 rule.mask,
                                 rule.kept,
                                 rule.dropped,
                                 static_cast<Real>(rule.weight),
                                 rule.factor};
    }
    launch_kernel(queue, "put_kernel", 1, 32, 0, put_kernel<Real>, batch, size, tasks + first);
  }
  if (selections.count > 0) {
    clear_ties(queue, ties, selections.count);
    launch_kernel(queue, "tie_kernel", slices, kThreads, 0, tie_kernel<Real>, base, tasks, tasks_count, ties, elements);
    launch_kernel(queue, "quota_kernel", selections.count, kQuotaThreads, 0, quota_kernel, ties);
  }
  const Real alpha = static_cast<Real>(options.alpha);
  if (options.election == Election::kNone) {
    launch_kernel(queue, "sum_kernel", slices, kThreads, 0, sum_kernel<Real>, base, tasks, tasks_count, ties, alpha,
                  elements, output, type);
  } else {
    launch_kernel(queue, "elect_kernel", slices, kThreads, 0, elect_kernel<Real>, base, tasks, tasks_count, ties,
                  options.election, options.normalize, static_cast<Real>(options.least), alpha, elements, output, type);
  }
}

}  // namespace

int64_t elect_and_sum_cuda_workspace(int64_t elements, int64_t tasks, int64_t selections) {
  const int64_t quotas = selections * slice_count(elements) * static_cast<int64_t>(sizeof(int));
  return tasks * static_cast<int64_t>(sizeof(Task<double>)) + quotas;
}

void elect_and_sum_cuda(const MatrixView& base, const MatrixView* tuned, const ElectTaskCuda* tasks, int64_t count,
                        const ElectOptions& options, const ElectSelections& selections, void* output, ElementType type,
                        void* workspace, int device, void* stream) {
  if (!is_contiguous(base) || !std::all_of(tuned, tuned + count, is_contiguous)) {
    throw std::runtime_error("elect_and_sum: the CUDA kernel reads contiguous tensors only");
  }
  if (element_count(base) == 0) return;
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  (any_float64(base, tuned, count) ? run<double> : run<float>)(queue, base, tuned, tasks, count, options, selections,
                                                               output, type, workspace);
}

}  // namespace r_tsvm
