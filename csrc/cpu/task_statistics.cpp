#include "r_tsvm/task_statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "parallel.h"
#include "r_tsvm/moments.h"

namespace r_tsvm {
namespace {

// Independent partial sums, added pairwise at the end: the compiler vectorises without fast-math, and every
// instruction set adds in the same order.
constexpr int kLanes = 16;

struct Sweep {
  double sum;
  double max;
  int64_t zeros;
};

RTSVM_INLINE double add_lanes(double (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Calls step(i, lane) for i = 0 ... n - 1, lane = i % kLanes.
template <class Step>
RTSVM_INLINE void for_lanes(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) step(i + lane, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) step(i + lane, lane);
}

// Replaces `values` by |values - base|.
template <class Real>
RTSVM_INLINE void magnitudes_any(const Real* __restrict base, Real* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = std::fabs(values[i] - base[i]);
}

// A NaN is in the sum, not in the maximum. Apart from the loop above because stores would keep the lanes in memory.
template <class Real>
RTSVM_INLINE Sweep summary_any(const Real* magnitudes, int64_t n) {
  double sum[kLanes] = {};
  Real max[kLanes] = {};
  int32_t zeros[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) {
    const Real a = magnitudes[i];
    sum[lane] += static_cast<double>(a);
    max[lane] = a > max[lane] ? a : max[lane];
    zeros[lane] += a == 0 ? 1 : 0;
  });
  Sweep sweep{add_lanes(sum), 0, 0};
  for (int lane = 0; lane < kLanes; ++lane) {
    sweep.max = std::max(sweep.max, static_cast<double>(max[lane]));
    sweep.zeros += zeros[lane];
  }
  return sweep;
}

template <class Real>
RTSVM_INLINE double squared_deviations_any(const Real* values, int64_t n, double mean) {
  double sum[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) {
    const double deviation = static_cast<double>(values[i]) - mean;
    sum[lane] += deviation * deviation;
  });
  return add_lanes(sum);
}

template <class Real>
RTSVM_INLINE Tail tail_any(const Real* base, const Real* values, int64_t n, Real theta, Real small_limit) {
  double sum[kLanes] = {};
  int32_t small[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) {
    const Real a = std::fabs(values[i] - base[i]);
    sum[lane] += static_cast<double>(a > theta ? a : Real{0});
    small[lane] += a <= small_limit ? 1 : 0;
  });
  Tail tail{add_lanes(sum), 0};
  for (int lane = 0; lane < kLanes; ++lane) tail.small += small[lane];
  return tail;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void magnitudes(const float* base, float* values, int64_t n) { magnitudes_any(base, values, n); }
RTSVM_ISA_CLONES void magnitudes(const double* base, double* values, int64_t n) { magnitudes_any(base, values, n); }

RTSVM_ISA_CLONES Sweep summary(const float* magnitudes, int64_t n) { return summary_any(magnitudes, n); }
RTSVM_ISA_CLONES Sweep summary(const double* magnitudes, int64_t n) { return summary_any(magnitudes, n); }

RTSVM_ISA_CLONES double squared_deviations(const float* values, int64_t n, double mean) {
  return squared_deviations_any(values, n, mean);
}
RTSVM_ISA_CLONES double squared_deviations(const double* values, int64_t n, double mean) {
  return squared_deviations_any(values, n, mean);
}

RTSVM_ISA_CLONES Tail tail(const float* base, const float* values, int64_t n, float theta, float small_limit) {
  return tail_any(base, values, n, theta, small_limit);
}
RTSVM_ISA_CLONES Tail tail(const double* base, const double* values, int64_t n, double theta, double small_limit) {
  return tail_any(base, values, n, theta, small_limit);
}

template <class Real>
class Calculation {
 public:
  Calculation(const MatrixView& base, const MatrixView* tuned, int64_t tasks, int threads)
      : base_(base),
        tuned_(tuned),
        tasks_(tasks),
        elements_(element_count(base)),
        threads_(threads),
        chunks_(chunk_count(elements_)),
        // Few chunks are also split by task; otherwise the base is converted once for all tasks.
        tasks_per_unit_(chunks_ >= threads ? tasks : std::max<int64_t>(1, tasks * chunks_ / threads)) {}

  // Merges block(values, base, n, task) over all blocks of each task: the blocks of a chunk in order, then the chunks,
  // so that threads only decide who does what.
  template <class Part, class Block>
  std::vector<Part> sweep(const Block& block) const {
    std::vector<Part> parts(tasks_ * chunks_, Part{});
    const int64_t groups = (tasks_ + tasks_per_unit_ - 1) / tasks_per_unit_;
    parallel_for(groups * chunks_, tasks_ * elements_, threads_, [&](int64_t unit) {
      const int64_t chunk = unit / groups;
      const int64_t first_task = unit % groups * tasks_per_unit_;
      const int64_t last_task = std::min(first_task + tasks_per_unit_, tasks_);
      alignas(64) Real base[kBlock];
      alignas(64) Real values[kBlock];
      const int64_t end = std::min((chunk + 1) * kChunk, elements_);
      for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
        const int64_t n = std::min(kBlock, end - first);
        load(base_, first, n, base);
        for (int64_t task = first_task; task < last_task; ++task) {
          load(tuned_[task], first, n, values);
          Part& part = parts[task * chunks_ + chunk];
          part = merge(part, block(values, base, n, task));
        }
      }
    });
    std::vector<Part> merged(tasks_, Part{});
    for (int64_t task = 0; task < tasks_; ++task) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        merged[task] = merge(merged[task], parts[task * chunks_ + chunk]);
      }
    }
    return merged;
  }

 private:
  const MatrixView base_;
  const MatrixView* tuned_;
  const int64_t tasks_;
  const int64_t elements_;
  const int threads_;
  const int64_t chunks_;
  const int64_t tasks_per_unit_;
};

template <class Real>
void run(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
         const TaskStatisticsOutput& output, int threads) {
  const Calculation<Real> calculation(base, tuned, tasks, threads);
  const auto moments = calculation.template sweep<Moments>([](Real* values, const Real* base, int64_t n, int64_t) {
    magnitudes(base, values, n);
    const Sweep sweep = summary(values, n);
    const double mean = sweep.sum / static_cast<double>(n);
    return Moments{n, sweep.sum, squared_deviations(values, n, mean), sweep.max, sweep.zeros};
  });

  std::vector<Summary> summaries;
  std::vector<Real> thetas, small_limits;
  for (const Moments& task : moments) {
    summaries.push_back(finish(task, sigma, eps));
    thetas.push_back(round_down<Real>(summaries.back().theta));
    small_limits.push_back(round_down<Real>(summaries.back().small_limit));
  }
  const auto tails = calculation.template sweep<Tail>([&](Real* values, const Real* base, int64_t n, int64_t task) {
    return tail(base, values, n, thetas[task], small_limits[task]);
  });

  for (int64_t task = 0; task < tasks; ++task) {
    output.mean[task] = summaries[task].mean;
    output.sd[task] = summaries[task].sd;
    output.max[task] = summaries[task].max;
    output.zeros[task] = moments[task].zeros;
    output.theta[task] = summaries[task].theta;
    output.outlier_mass[task] = outlier_mass(summaries[task], tails[task]);
    output.small[task] = tails[task].small;
  }
}

}  // namespace

void task_statistics_cpu(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
                         const TaskStatisticsOutput& output, int threads) {
  if (any_float64(base, tuned, tasks)) {
    run<double>(base, tuned, tasks, sigma, eps, output, threads);
  } else {
    run<float>(base, tuned, tasks, sigma, eps, output, threads);
  }
}

}  // namespace r_tsvm
