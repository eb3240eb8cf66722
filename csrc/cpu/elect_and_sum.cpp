#include "r_tsvm/elect_and_sum.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "random_words.h"

namespace r_tsvm {
namespace {

// All buffers of a slice together stay within a 32 KiB L1 cache, nearly so for float64.
constexpr int64_t kSlice = 512;
static_assert(kChunk % kSlice == 0 && kSlice % kWordGroup == 0);

constexpr int64_t kEveryTie = std::numeric_limits<int64_t>::max();

template <class Real>
struct Rule {
  Real threshold;
  int64_t ties;
  // Those that no chunk has claimed yet; used by one thread at a time.
  int64_t unclaimed;
  // Per chunk: how many of its tied elements are still to be selected. Each is used by the chunk's thread alone.
  std::vector<int64_t> ties_left;

  bool used() const { return ties >= 0; }
  bool counts_ties() const { return ties > 0; }
};

template <class Real>
struct Task {
  MatrixView view;
  Real weight;
  Real factor;
  Rule<Real> kept;
  Rule<Real> dropped;
  RandomMask sampled;
  RankedSelection ranked;
  const uint8_t* mask;

  bool samples() const { return sampled.threshold < (uint64_t{1} << 32); }
  bool sparse() const {
    return kept.used() || dropped.used() || samples() || ranked.ranks != nullptr || mask != nullptr;
  }
};

template <class Real>
struct Problem {
  MatrixView base;
  std::vector<Task<Real>> tasks;
  Election election;
  bool normalize;
  Real alpha;
  Real* output;
  int64_t elements;
};

// The two outcomes of an election are summed side by side, so that one pass over the tasks is enough.
template <class Real>
struct Sums {
  alignas(64) Real votes[kSlice];
  alignas(64) Real positive[kSlice];
  alignas(64) Real negative[kSlice];
  alignas(64) Real positive_weight[kSlice];
  alignas(64) Real negative_weight[kSlice];
};

template <class Real>
RTSVM_INLINE void subtract(Real* __restrict values, const Real* __restrict base, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] -= base[i];
}

// Sets `values` to 0 where `wanted` is not whether the difference is selected.
template <class Real>
RTSVM_INLINE void select(const Real* __restrict differences, Real* __restrict values, int64_t n, Real threshold,
                         int64_t& ties_left, bool wanted) {
  if (ties_left == 0) {
    for (int64_t i = 0; i < n; ++i) values[i] = (std::fabs(differences[i]) > threshold) == wanted ? values[i] : Real{0};
  } else if (ties_left == kEveryTie) {
    for (int64_t i = 0; i < n; ++i)
      values[i] = (std::fabs(differences[i]) >= threshold) == wanted ? values[i] : Real{0};
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Real magnitude = std::fabs(differences[i]);
      const bool tie = magnitude == threshold && ties_left > 0;
      ties_left -= tie ? 1 : 0;
      values[i] = (magnitude > threshold || tie) == wanted ? values[i] : Real{0};
    }
  }
}

template <class Real>
RTSVM_INLINE void cover(const uint8_t* __restrict mask, Real* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = mask[i] != 0 ? values[i] : Real{0};
}

template <class Real>
RTSVM_INLINE void sample(const uint32_t* __restrict words, Real* __restrict values, int64_t n, uint64_t threshold) {
  for (int64_t i = 0; i < n; ++i) values[i] = words[i] < threshold ? values[i] : Real{0};
}

// Also multiplies the survivors.
template <class Real>
RTSVM_INLINE void sample_ranked(const uint32_t* __restrict words, const int32_t* __restrict ranks,
                                const int64_t* __restrict thresholds, const Real* __restrict factors,
                                Real* __restrict values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Real product = factors[ranks[i]] * values[i];  // in any case: a branch could not be vectorised
    values[i] = words[i] < thresholds[ranks[i]] ? product : Real{0};
  }
}

template <class Real>
RTSVM_INLINE void add(const Real* __restrict values, int64_t n, Real factor, Real* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * values[i];
}

// `scale` times a value votes, `factor` times it is summed. NaN is on both sides, so that it never disappears.
template <class Real>
RTSVM_INLINE void vote(const Real* __restrict values, int64_t n, Real scale, Real factor, bool count,
                       Sums<Real>& sums) {
  for (int64_t i = 0; i < n; ++i) {
    const Real voter = scale * values[i];
    const Real value = factor * values[i];
    const Real sign = static_cast<Real>(voter > 0 ? 1 : 0) - static_cast<Real>(voter < 0 ? 1 : 0);
    sums.votes[i] += count ? sign : voter;
    sums.positive[i] += voter < 0 ? Real{0} : value;
    sums.negative[i] += voter > 0 ? Real{0} : value;
  }
}

template <class Real>
RTSVM_INLINE void add_weights(const Real* __restrict values, int64_t n, Real scale, Real weight, Sums<Real>& sums) {
  for (int64_t i = 0; i < n; ++i) {
    const Real voter = scale * values[i];
    sums.positive_weight[i] += voter > 0 ? weight : Real{0};
    sums.negative_weight[i] += voter < 0 ? weight : Real{0};
  }
}

// Leaves the sum, or mean, over the elected side in `positive`.
template <class Real>
RTSVM_INLINE void decide(Sums<Real>& sums, int64_t n, bool normalize) {
  for (int64_t i = 0; i < n; ++i) sums.positive[i] = sums.votes[i] >= 0 ? sums.positive[i] : sums.negative[i];
  if (!normalize) return;
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = sums.votes[i] >= 0 ? sums.positive_weight[i] : sums.negative_weight[i];
    sums.positive[i] /= weight == 0 ? Real{1} : weight;
  }
}

template <class Real>
RTSVM_INLINE void add_update(const Real* __restrict base, const Real* __restrict update, int64_t n, Real alpha,
                             Real* __restrict output) {
  for (int64_t i = 0; i < n; ++i) {
    const Real step = alpha * update[i];
    output[i] = step == 0 ? base[i] : base[i] + step;
  }
}

template <class Real>
RTSVM_INLINE void merge_chunk_any(Problem<Real>& problem, int64_t chunk) {
  alignas(64) Real base[kSlice];
  alignas(64) Real differences[kSlice];
  alignas(64) Real survivors[kSlice];
  alignas(64) uint32_t words[kSlice];
  Sums<Real> sums;
  const bool elects = problem.election != Election::kNone;
  const int64_t end = std::min((chunk + 1) * kChunk, problem.elements);
  for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
    const int64_t n = std::min(kSlice, end - first);
    load(problem.base, first, n, base);
    std::memset(&sums, 0, sizeof(sums));
    for (Task<Real>& task : problem.tasks) {
      load(task.view, first, n, differences);
      subtract(differences, base, n);
      const Real* values = differences;
      if (task.sparse()) {
        std::memcpy(survivors, differences, n * sizeof(Real));
        if (task.kept.used()) {
          select(differences, survivors, n, task.kept.threshold, task.kept.ties_left[chunk], true);
        }
        if (task.dropped.used()) {
          select(differences, survivors, n, task.dropped.threshold, task.dropped.ties_left[chunk], false);
        }
        if (task.mask != nullptr) cover(task.mask + first, survivors, n);
        if (task.samples() || task.ranked.ranks != nullptr) random_words(task.sampled, first, n, words);
        if (task.samples()) sample(words, survivors, n, task.sampled.threshold);
        if (task.ranked.ranks != nullptr) {
          sample_ranked(words, task.ranked.ranks + first, task.ranked.thresholds,
                        static_cast<const Real*>(task.ranked.factors), survivors, n);
        }
        values = survivors;
      }
      if (!elects) {
        add(values, n, task.factor, sums.positive);
      } else {
        const Real scale = problem.election == Election::kUnweighted ? Real{1} : task.factor;
        vote(values, n, scale, task.factor, problem.election == Election::kCount, sums);
        if (problem.normalize) add_weights(values, n, scale, task.weight, sums);
      }
    }
    if (elects) decide(sums, n, problem.normalize);
    add_update(base, sums.positive, n, problem.alpha, problem.output + first);
  }
}

template <class Real>
RTSVM_INLINE int64_t tied(const Real* differences, int64_t n, Real threshold) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += std::fabs(differences[i]) == threshold ? 1 : 0;
  return count;
}

// Counts the tied elements of the chunk into ties_left, for the rules that need it.
template <class Real>
RTSVM_INLINE void count_ties_any(Problem<Real>& problem, int64_t chunk) {
  alignas(64) Real base[kSlice];
  alignas(64) Real differences[kSlice];
  const int64_t end = std::min((chunk + 1) * kChunk, problem.elements);
  for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
    const int64_t n = std::min(kSlice, end - first);
    load(problem.base, first, n, base);
    for (Task<Real>& task : problem.tasks) {
      if (!task.kept.counts_ties() && !task.dropped.counts_ties()) continue;
      load(task.view, first, n, differences);
      subtract(differences, base, n);
      if (task.kept.counts_ties()) task.kept.ties_left[chunk] += tied(differences, n, task.kept.threshold);
      if (task.dropped.counts_ties()) task.dropped.ties_left[chunk] += tied(differences, n, task.dropped.threshold);
    }
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void merge_chunk(Problem<float>& problem, int64_t chunk) { merge_chunk_any(problem, chunk); }
RTSVM_ISA_CLONES void merge_chunk(Problem<double>& problem, int64_t chunk) { merge_chunk_any(problem, chunk); }

RTSVM_ISA_CLONES void count_ties(Problem<float>& problem, int64_t chunk) { count_ties_any(problem, chunk); }
RTSVM_ISA_CLONES void count_ties(Problem<double>& problem, int64_t chunk) { count_ties_any(problem, chunk); }

// Turns the number of tied elements in the chunk into the number of them that are selected.
template <class Real>
void claim_ties(Rule<Real>& rule, int64_t chunk) {
  if (!rule.counts_ties()) return;
  const int64_t tied = rule.ties_left[chunk];
  rule.ties_left[chunk] = tied <= rule.unclaimed ? kEveryTie : rule.unclaimed;
  rule.unclaimed -= std::min(tied, rule.unclaimed);
}

template <class Real>
Rule<Real> rule(const Selection& selection, int64_t chunks) {
  return Rule<Real>{static_cast<Real>(selection.threshold), selection.ties, selection.ties,
                    std::vector<int64_t>(selection.ties >= 0 ? chunks : 0)};
}

template <class Real>
void run(const MatrixView& base, const MatrixView* tuned, const ElectTask* tasks, int64_t count,
         const ElectOptions& options, void* output, int threads) {
  const int64_t elements = element_count(base);
  const int64_t chunks = chunk_count(elements);
  Problem<Real> problem{
      base,    {}, options.election, options.normalize, static_cast<Real>(options.alpha), static_cast<Real*>(output),
      elements};
  bool counts_ties = false;
  for (int64_t t = 0; t < count; ++t) {
    const double factor = tasks[t].ranked.ranks == nullptr ? tasks[t].factor : 1;
    problem.tasks.push_back(Task<Real>{tuned[t], static_cast<Real>(tasks[t].weight), static_cast<Real>(factor),
                                       rule<Real>(tasks[t].kept, chunks), rule<Real>(tasks[t].dropped, chunks),
                                       tasks[t].sampled, tasks[t].ranked, tasks[t].mask});
    const Task<Real>& task = problem.tasks.back();
    counts_ties = counts_ties || task.kept.counts_ties() || task.dropped.counts_ties();
  }
  prefer_huge_pages(output, elements * sizeof(Real));
  // Chunks begin in order, whatever the schedule. Each claims its ties as soon as it has counted them and those before
  // it have claimed theirs, which waits for no merging: the inputs are still in the cache when they are merged.
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> claimed{0};
  parallel_for(chunks, elements * (count + 1), threads, [&](int64_t) {
    const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
    if (counts_ties) {
      count_ties(problem, chunk);
      while (claimed.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
      for (Task<Real>& task : problem.tasks) {
        claim_ties(task.kept, chunk);
        claim_ties(task.dropped, chunk);
      }
      claimed.store(chunk + 1, std::memory_order_release);
    }
    merge_chunk(problem, chunk);
  });
}

}  // namespace

void elect_and_sum_cpu(const MatrixView& base, const MatrixView* tuned, const ElectTask* tasks, int64_t count,
                       const ElectOptions& options, void* output, int threads) {
  if (any_float64(base, tuned, count)) {
    run<double>(base, tuned, tasks, count, options, output, threads);
  } else {
    run<float>(base, tuned, tasks, count, options, output, threads);
  }
}

}  // namespace r_tsvm
