#include <algorithm>

#include "check.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "r_tsvm/moments.h"
#include "r_tsvm/task_statistics.h"
#include "reduce.cuh"

namespace r_tsvm {
namespace {

constexpr char kOp[] = "task_statistics";
constexpr int kPerThread = 8;
constexpr int kChunk = kThreads * kPerThread;  // elements of one thread block
constexpr int kMaxTasks = 8;                   // tasks of one launch

// Limits the registers: more resident threads have more reads under way.
template <class Real>
constexpr int kBlocksPerProcessor = sizeof(Real) == 4 ? 5 : 3;

struct TunedViews {
  MatrixView task[kMaxTasks];
};

// Workspace of one launch, in this order: parts are stored (tasks, chunks).
struct Workspace {
  Moments* moments;
  Tail* tails;
  Summary* summaries;
};

int64_t chunk_count(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

__device__ int chunk_size(int64_t first, int64_t elements) {
  return static_cast<int>(elements - first < kChunk ? elements - first : kChunk);
}

// Thread block c: moments of chunk c of each task. The base stays in registers.
template <class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<Real>)
    moments_kernel(const __grid_constant__ MatrixView base, const __grid_constant__ TunedViews tuned, int tasks,
                   int64_t elements, Moments* moments) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int count = chunk_size(first, elements);
  Real origin[kPerThread], a[kPerThread];
  load<kThreads>(base, first, count, origin);
  for (int task = 0; task < tasks; ++task) {
    load<kThreads>(tuned.task[task], first, count, a);
    double sum = 0;
    Real max = 0;
    int zeros = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      a[j] = fabs(a[j] - origin[j]);
      // Beyond the end a is 0: only the zeros need to be told apart.
      const bool inside = static_cast<int>(threadIdx.x) + j * kThreads < count;
      sum += static_cast<double>(a[j]);
      max = a[j] > max ? a[j] : max;
      zeros += inside && a[j] == 0 ? 1 : 0;
    }
    sum = block_reduce<kThreads>(sum, Add());
    max = block_reduce<kThreads>(max, Larger());
    zeros = block_reduce<kThreads>(zeros, Add());
    const double mean = sum / static_cast<double>(count);
    double squares = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const bool inside = static_cast<int>(threadIdx.x) + j * kThreads < count;
      const double deviation = inside ? static_cast<double>(a[j]) - mean : 0.0;
      squares += deviation * deviation;
    }
    squares = block_reduce<kThreads>(squares, Add());
    if (threadIdx.x == 0) {
      moments[static_cast<int64_t>(task) * gridDim.x + blockIdx.x] =
          Moments{count, sum, squares, static_cast<double>(max), zeros};
    }
  }
}

// Thread block t: task t as a whole.
__global__ void __launch_bounds__(kThreads)
    summary_kernel(const Moments* moments, int64_t chunks, double sigma, double eps, Summary* summaries,
                   const __grid_constant__ TaskStatisticsOutput output) {
  const int task = blockIdx.x;
  const Moments all = block_merge<kThreads>(moments + task * chunks, chunks);
  if (threadIdx.x != 0) return;
  const Summary summary = finish(all, sigma, eps);
  summaries[task] = summary;
  output.mean[task] = summary.mean;
  output.sd[task] = summary.sd;
  output.max[task] = summary.max;
  output.zeros[task] = all.zeros;
  output.theta[task] = summary.theta;
}

// Thread block c: what chunk c of each task holds above theta and below the small limit.
template <class Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<Real>)
    tail_kernel(const __grid_constant__ MatrixView base, const __grid_constant__ TunedViews tuned, int tasks,
                int64_t elements, const Summary* summaries, Tail* tails) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int count = chunk_size(first, elements);
  Real origin[kPerThread], a[kPerThread];
  load<kThreads>(base, first, count, origin);
  for (int task = 0; task < tasks; ++task) {
    load<kThreads>(tuned.task[task], first, count, a);
    const Real theta = round_down<Real>(summaries[task].theta);
    const Real small_limit = round_down<Real>(summaries[task].small_limit);
    double outlier_sum = 0;
    int small = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const Real magnitude = fabs(a[j] - origin[j]);
      const bool inside = static_cast<int>(threadIdx.x) + j * kThreads < count;
      outlier_sum += magnitude > theta ? static_cast<double>(magnitude) : 0.0;
      small += inside && magnitude <= small_limit ? 1 : 0;
    }
    outlier_sum = block_reduce<kThreads>(outlier_sum, Add());
    small = block_reduce<kThreads>(small, Add());
    if (threadIdx.x == 0) tails[static_cast<int64_t>(task) * gridDim.x + blockIdx.x] = Tail{outlier_sum, small};
  }
}

// Thread block t: task t as a whole.
__global__ void __launch_bounds__(kThreads) finish_kernel(const Tail* tails, int64_t chunks, const Summary* summaries,
                                                          const __grid_constant__ TaskStatisticsOutput output) {
  const int task = blockIdx.x;
  const Tail all = block_merge<kThreads>(tails + task * chunks, chunks);
  if (threadIdx.x != 0) return;
  output.outlier_mass[task] = outlier_mass(summaries[task], all);
  output.small[task] = all.small;
}

template <class Real>
void launch(const MatrixView& base, const TunedViews& tuned, int tasks, double sigma, double eps,
            const TaskStatisticsOutput& output, const Workspace& workspace, const Queue& queue) {
  const int64_t elements = element_count(base);
  const int64_t chunks = chunk_count(elements);
  if (chunks > 0) {
    launch_kernel(queue, "moments_kernel", chunks, kThreads, 0, moments_kernel<Real>, base, tuned, tasks, elements,
                  workspace.moments);
  }
  launch_kernel(queue, "summary_kernel", tasks, kThreads, 0, summary_kernel, workspace.moments, chunks, sigma, eps,
                workspace.summaries, output);
  if (chunks > 0) {
    launch_kernel(queue, "tail_kernel", chunks, kThreads, 0, tail_kernel<Real>, base, tuned, tasks, elements,
                  workspace.summaries, workspace.tails);
  }
  launch_kernel(queue, "finish_kernel", tasks, kThreads, 0, finish_kernel, workspace.tails, chunks, workspace.summaries,
                output);
}

TaskStatisticsOutput from_task(const TaskStatisticsOutput& output, int64_t task) {
  return TaskStatisticsOutput{output.mean + task,  output.sd + task,           output.max + task,  output.zeros + task,
                              output.theta + task, output.outlier_mass + task, output.small + task};
}

}  // namespace

int64_t task_statistics_cuda_workspace(int64_t elements, int64_t tasks) {
  const int64_t chunk_bytes = static_cast<int64_t>(sizeof(Moments) + sizeof(Tail));
  const int64_t task_bytes = chunk_count(elements) * chunk_bytes + static_cast<int64_t>(sizeof(Summary));
  return std::min<int64_t>(tasks, kMaxTasks) * task_bytes;
}

void task_statistics_cuda(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
                          const TaskStatisticsOutput& output, void* workspace, int device, void* stream) {
  if (!is_contiguous(base) || !std::all_of(tuned, tuned + tasks, is_contiguous)) {
    throw std::runtime_error("task_statistics: the CUDA kernel reads contiguous tensors only");
  }
  const int64_t chunks = chunk_count(element_count(base));
  if (chunks > 0x7fffffff) throw std::runtime_error("task_statistics: the tensor exceeds 2^42 elements");
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  const bool in_float64 = any_float64(base, tuned, tasks);
  // Later launches reuse the workspace: they follow on the same stream.
  for (int64_t first = 0; first < tasks; first += kMaxTasks) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTasks, tasks - first));
    Workspace parts;
    parts.moments = static_cast<Moments*>(workspace);
    parts.tails = reinterpret_cast<Tail*>(parts.moments + count * chunks);
    parts.summaries = reinterpret_cast<Summary*>(parts.tails + count * chunks);
    TunedViews views{};
    std::copy(tuned + first, tuned + first + count, views.task);
    const auto launch_real = in_float64 ? launch<double> : launch<float>;
    launch_real(base, views, count, sigma, eps, from_task(output, first), parts, queue);
  }
}

}  // namespace r_tsvm
