// Nearly all work is done in one read of the inputs. A sample brackets the two limits. Elements outside the brackets
// are summed or counted at once, and elements inside are listed; the lists are evaluated when mean and deviation are
// known. If a bracket misses or a list is full, another pass computes what the limits decide.
#include "r_tsvm/task_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "keep.h"
#include "lanes.h"
#include "moments.h"
#include "parallel.h"
#include "sample.h"

namespace r_tsvm {
namespace {

// Largest number of elements of a chunk that are listed.
constexpr int64_t kListed = kChunk / 16;

constexpr int64_t kMostRuns = 2048;

template <class Real>
struct Limits {
  Real small;
  Real theta;
};

// What a sample shows about one task; NaN brackets mean that nothing is known. `pivot` is finite, and near the mean if
// possible.
template <class Real>
struct Guess {
  double pivot;
  Limits<Real> low;
  Limits<Real> high;

  bool holds(const Limits<Real>& limits) const {
    return low.small <= limits.small && limits.small <= high.small && low.theta <= limits.theta &&
           limits.theta <= high.theta;
  }
};

// The sums of a block.
struct Sweep {
  double deviations;  // from the pivot
  double squares;     // of these
  double outliers;    // magnitudes that are surely above theta
  double max;
  int64_t zeros;
  int64_t small;  // magnitudes that are surely small
};

template <class Real>
struct Chunk {
  Moments moments;
  Tail tail;
  int64_t undecided;
  std::unique_ptr<Real[]> list;  // the undecided magnitudes in order, or null where they were too many
};

// NaN shows in the sums, not in the maximum.
template <class Real>
RTSVM_INLINE Sweep sweep_any(const Real* values, int64_t n, double pivot, Real small_limit, Real theta) {
  double deviations[kLanes] = {}, squares[kLanes] = {}, outliers[kLanes] = {};
  Real max[kLanes] = {};
  int32_t zeros[kLanes] = {}, small[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) {
    const Real a = std::fabs(values[i]);
    const double deviation = static_cast<double>(a) - pivot;
    deviations[lane] += deviation;
    squares[lane] += deviation * deviation;
    outliers[lane] += static_cast<double>(a > theta ? a : Real{0});
    max[lane] = a > max[lane] ? a : max[lane];
    zeros[lane] += a == 0 ? 1 : 0;
    small[lane] += a <= small_limit ? 1 : 0;
  });
  Sweep sweep{add_lanes(deviations), add_lanes(squares), add_lanes(outliers), 0, 0, 0};
  for (int lane = 0; lane < kLanes; ++lane) {
    sweep.max = std::max(sweep.max, static_cast<double>(max[lane]));
    sweep.zeros += zeros[lane];
    sweep.small += small[lane];
  }
  return sweep;
}

// Separate from the loop above, because stores would keep the lanes in memory.
template <class Real>
RTSVM_INLINE void mark_any(const Real* __restrict values, int64_t n, const Limits<Real>& low, const Limits<Real>& high,
                           uint8_t* __restrict marks) {
  for (int64_t i = 0; i < n; ++i) {
    const Real a = std::fabs(values[i]);
    marks[i] = ((a > low.small) & (a <= high.small)) | ((a > low.theta) & (a <= high.theta)) ? 1 : 0;
  }
}

template <class Real>
RTSVM_INLINE Tail tail_any(const Real* values, int64_t n, const Limits<Real>& limits) {
  double sum[kLanes] = {};
  int32_t small[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) {
    const Real a = std::fabs(values[i]);
    sum[lane] += static_cast<double>(a > limits.theta ? a : Real{0});
    small[lane] += a <= limits.small ? 1 : 0;
  });
  Tail tail{add_lanes(sum), 0};
  for (int lane = 0; lane < kLanes; ++lane) tail.small += small[lane];
  return tail;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES Sweep sweep(const float* values, int64_t n, double pivot, float small_limit, float theta) {
  return sweep_any(values, n, pivot, small_limit, theta);
}
RTSVM_ISA_CLONES Sweep sweep(const double* values, int64_t n, double pivot, double small_limit, double theta) {
  return sweep_any(values, n, pivot, small_limit, theta);
}

RTSVM_ISA_CLONES void mark(const float* values, int64_t n, const Limits<float>& low, const Limits<float>& high,
                           uint8_t* marks) {
  mark_any(values, n, low, high, marks);
}
RTSVM_ISA_CLONES void mark(const double* values, int64_t n, const Limits<double>& low, const Limits<double>& high,
                           uint8_t* marks) {
  mark_any(values, n, low, high, marks);
}

RTSVM_ISA_CLONES Tail tail(const float* values, int64_t n, const Limits<float>& limits) {
  return tail_any(values, n, limits);
}
RTSVM_ISA_CLONES Tail tail(const double* values, int64_t n, const Limits<double>& limits) {
  return tail_any(values, n, limits);
}

template <class Real>
Limits<Real> limits_of(const Summary& summary) {
  return Limits<Real>{round_down<Real>(summary.small_limit), round_down<Real>(summary.theta)};
}

template <class Real>
Guess<Real> guess_limits(const std::vector<Real>& sample, double sigma, double eps) {
  const double n = static_cast<double>(sample.size());
  double sum = 0, squares = 0, fourths = 0;
  for (const Real value : sample) sum += std::fabs(value);
  const double mean = sum / n;
  for (const Real value : sample) {
    const double deviation = std::fabs(value) - mean;
    squares += deviation * deviation;
    fourths += deviation * deviation * deviation * deviation;
  }
  const double variance = squares / n;
  const double sd = std::sqrt(variance);
  // Five standard errors for independent elements, as a margin: neighbours are correlated.
  const double mean_margin = 5 * sd / std::sqrt(n);
  const double sd_margin = sd > 0 ? 5 * std::sqrt((fourths / n / variance - variance) / (4 * n)) : 0;
  const auto limits = [&](double sign) {
    Summary summary{};
    summary.small_limit = eps * (mean + sign * mean_margin);
    summary.theta = std::isinf(sigma) ? sigma : mean + sigma * sd + sign * (mean_margin + sigma * sd_margin);
    return limits_of<Real>(summary);
  };
  return Guess<Real>{std::isfinite(mean) ? mean : 0, limits(-1), limits(1)};
}

template <class Real>
class Calculation {
 public:
  Calculation(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps, int threads)
      : base_(base),
        tuned_(tuned),
        tasks_(tasks),
        sigma_(sigma),
        eps_(eps),
        elements_(element_count(base)),
        threads_(threads),
        chunks_(chunk_count(elements_)) {}

  void run(const TaskStatisticsOutput& output) const {
    const std::vector<Guess<Real>> guesses = guess();
    std::vector<Chunk<Real>> parts(tasks_ * chunks_);
    for_chunks_of_tasks(
        [&](int64_t chunk, int64_t task) { parts[task * chunks_ + chunk] = measure(chunk, task, guesses[task]); });
    for (int64_t task = 0; task < tasks_; ++task) {
      const Chunk<Real>* const chunks = parts.data() + task * chunks_;
      Moments moments{};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) moments = merge(moments, chunks[chunk].moments);
      const Summary summary = finish(moments, sigma_, eps_);
      const Tail tail = tail_of(task, chunks, guesses[task], limits_of<Real>(summary));
      output.mean[task] = summary.mean;
      output.sd[task] = summary.sd;
      output.max[task] = summary.max;
      output.zeros[task] = moments.zeros;
      output.theta[task] = summary.theta;
      output.outlier_mass[task] = outlier_mass(summary, tail);
      output.small[task] = tail.small;
    }
  }

 private:
  std::vector<Guess<Real>> guess() const {
    const int64_t runs = sample_runs(elements_, kMostRuns);
    std::vector<Guess<Real>> guesses(tasks_);
    parallel_for(tasks_, tasks_ * elements_, threads_, [&](int64_t task) {
      // Tensors too small for a sample take their pivot from the first elements, and need the second pass.
      std::vector<Real> sample(runs > 0 ? runs * kRun : std::min(elements_, kBlock));
      for (int64_t run = 0; run < runs; ++run) {
        values_of(task, run_start(run, runs, elements_), kRun, sample.data() + run * kRun);
      }
      if (runs == 0) values_of(task, 0, static_cast<int64_t>(sample.size()), sample.data());
      guesses[task] = guess_limits(sample, sigma_, eps_);
    });
    return guesses;
  }

  Chunk<Real> measure(int64_t chunk, int64_t task, const Guess<Real>& guess) const {
    Chunk<Real> known{};
    alignas(64) Real values[kBlock];
    Marks marks;
    Positions positions;
    Real list[kListed];
    for_blocks(chunk, [&](int64_t first, int64_t n) {
      values_of(task, first, n, values);
      const Sweep block = sweep(values, n, guess.pivot, guess.low.small, guess.high.theta);
      const double count = static_cast<double>(n);
      const double rest = block.squares - block.deviations / count * block.deviations;
      // If the squares of finite values overflow, both terms are infinite and their difference is NaN.
      const bool overflows = std::isinf(block.squares) && std::isfinite(block.deviations);
      const double squares = overflows ? block.squares : std::max(0.0, rest);
      known.moments =
          merge(known.moments, Moments{n, count * guess.pivot + block.deviations, squares, block.max, block.zeros});
      known.tail = merge(known.tail, Tail{block.outliers, block.small});
      mark(values, n, guess.low, guess.high, marks.at);
      const int64_t found = list_marked(marks, n, positions);
      const int64_t listed = known.undecided;
      known.undecided += found;
      if (known.undecided > kListed) return;
      for (int64_t i = 0; i < found; ++i) list[listed + i] = std::fabs(values[positions.at[i]]);
    });
    if (known.undecided <= kListed) known.list.reset(new (std::nothrow) Real[known.undecided]);
    if (known.list) std::copy_n(list, known.undecided, known.list.get());
    return known;
  }

  Tail tail_of(int64_t task, const Chunk<Real>* chunks, const Guess<Real>& guess, const Limits<Real>& limits) const {
    const bool known = std::all_of(chunks, chunks + chunks_, [](const Chunk<Real>& chunk) { return !!chunk.list; });
    if (!known || !guess.holds(limits)) return second_pass(task, limits);
    Tail all{};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      Tail tail = chunks[chunk].tail;
      for (int64_t i = 0; i < chunks[chunk].undecided; ++i) {
        const Real a = chunks[chunk].list[i];
        // Elements beyond the far ends are in the sums already.
        if (a > limits.theta && a <= guess.high.theta) tail.outlier_sum += static_cast<double>(a);
        if (a <= limits.small && a > guess.low.small) ++tail.small;
      }
      all = merge(all, tail);
    }
    return all;
  }

  Tail second_pass(int64_t task, const Limits<Real>& limits) const {
    std::vector<Tail> parts(chunks_);
    parallel_for(chunks_, elements_, threads_, [&](int64_t chunk) {
      alignas(64) Real values[kBlock];
      for_blocks(chunk, [&](int64_t first, int64_t n) {
        values_of(task, first, n, values);
        parts[chunk] = merge(parts[chunk], tail(values, n, limits));
      });
    });
    Tail all{};
    for (const Tail& part : parts) all = merge(all, part);
    return all;
  }

  // Calls body(chunk, task). While there are chunks for every thread, one thread takes a chunk of all tasks, so that
  // it reads the base once.
  template <class Body>
  void for_chunks_of_tasks(const Body& body) const {
    const int64_t grain = chunks_ >= threads_ ? tasks_ : 1;
    parallel_for(
        chunks_ * tasks_, tasks_ * elements_, threads_, [&](int64_t unit) { body(unit / tasks_, unit % tasks_); },
        grain);
  }

  // Calls body(first, n) for the blocks of a chunk.
  template <class Body>
  void for_blocks(int64_t chunk, const Body& body) const {
    const int64_t end = std::min((chunk + 1) * kChunk, elements_);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) body(first, std::min(kBlock, end - first));
  }

  void values_of(int64_t task, int64_t first, int64_t n, Real* values) const {
    load_difference(tuned_[task], base_, first, n, std::numeric_limits<Real>::infinity(), values);
  }

  const MatrixView base_;
  const MatrixView* tuned_;
  const int64_t tasks_;
  const double sigma_;
  const double eps_;
  const int64_t elements_;
  const int threads_;
  const int64_t chunks_;
};

}  // namespace

void task_statistics_cpu(const MatrixView& base, const MatrixView* tuned, int64_t tasks, double sigma, double eps,
                         const TaskStatisticsOutput& output, int threads) {
  if (any_float64(base, tuned, tasks)) {
    Calculation<double>(base, tuned, tasks, sigma, eps, threads).run(output);
  } else {
    Calculation<float>(base, tuned, tasks, sigma, eps, threads).run(output);
  }
}

}  // namespace r_tsvm
