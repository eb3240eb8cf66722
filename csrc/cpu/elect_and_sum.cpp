#include "r_tsvm/elect_and_sum.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "random_words.h"
#include "store.h"

namespace r_tsvm {
namespace {

// All buffers of a slice together fit into a 32 KiB L1 cache, or nearly fit for float64.
constexpr int64_t kSlice = 256;
static_assert(kChunk % kSlice == 0 && kSlice % kWordGroup == 0);

constexpr int64_t kEveryTie = std::numeric_limits<int64_t>::max();

template <class Real>
constexpr Real kUnclipped = std::numeric_limits<Real>::infinity();

template <class Real>
struct Rule {
  Real threshold;
  int64_t ties;
  // Ties that no chunk has claimed yet; used by one thread at a time.
  int64_t unclaimed;
  // Per chunk, the number of tied elements still to be selected. Only the chunk's thread uses it.
  std::vector<int64_t> ties_left;

  bool used() const { return ties >= 0; }
  bool counts_ties() const { return ties > 0; }
};

template <class Real>
struct Task {
  MatrixView view;
  Real weight;
  double factor;
  Rule<Real> kept;
  Rule<Real> dropped;
  RandomMask sampled;
  RankedSelection ranked;
  const uint8_t* mask;

  bool samples() const { return sampled.threshold < (uint64_t{1} << 32); }
  bool by_rank() const { return ranked.ranks != nullptr; }
};

template <class Real>
struct Problem {
  MatrixView base;
  std::vector<Task<Real>> tasks;
  Election election;
  bool normalize;
  Real least;
  Real alpha;
  void* output;
  ElementType type;  // of the output
  int64_t elements;
};

// Of a slice.
template <class Real>
struct Sums {
  alignas(64) double votes[kSlice];
  alignas(64) Real total[kSlice];
  alignas(64) Real weight[kSlice];
  alignas(64) Real side[kSlice];
};

// The surviving differences of a task in a slice, and for a selection by rank the factors.
template <class Real>
struct Slice {
  alignas(64) Real values[kSlice];
  alignas(64) double factors[kSlice];
};

// Sets `values` to 0 where the selection of the difference differs from `wanted`.
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

// Also stores the factors.
template <class Real>
RTSVM_INLINE void sample_ranked(const uint32_t* __restrict words, const RankedSelection& ranked, int64_t first,
                                int64_t n, Real* __restrict values, double* __restrict factors) {
  const int32_t* const ranks = ranked.ranks + first;
  for (int64_t i = 0; i < n; ++i) {
    factors[i] = ranked.factors[ranks[i]];
    values[i] = words[i] < ranked.thresholds[ranks[i]] ? values[i] : Real{0};
  }
}

// One factor for all elements, in place of an array.
struct Same {
  double factor;
  RTSVM_INLINE double operator[](int64_t) const { return factor; }
};

template <class Real, class Factors>
RTSVM_INLINE void add(const Real* __restrict values, int64_t n, const Factors factors, Real* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<Real>(factors[i]) * values[i];
}

template <class Real, class Factors>
RTSVM_INLINE void vote(const Real* __restrict values, int64_t n, const Factors factors, double* __restrict votes) {
  for (int64_t i = 0; i < n; ++i) {
    const double ballot = factors[i] * values[i];
    votes[i] += std::max(ballot, kAgainst * ballot);
  }
}

template <class Real, class Factors>
RTSVM_INLINE void vote_once(const Real* __restrict values, int64_t n, const Factors factors, double* __restrict votes) {
  for (int64_t i = 0; i < n; ++i) {
    const Real value = static_cast<Real>(factors[i]) * values[i];
    votes[i] += (value > 0 ? 1.0 : 0.0) - (value < 0 ? 1.0 : 0.0);
  }
}

template <class Real>
RTSVM_INLINE void decide(const double* __restrict votes, int64_t n, Real* __restrict side) {
  for (int64_t i = 0; i < n; ++i) side[i] = votes[i] >= 0 ? Real{1} : Real{-1};
}

// `side` has the elected signs. NaN is against neither, so that it is never lost.
template <bool kUnweighted, bool kNormalize, class Real, class Factors>
RTSVM_INLINE void add_elected(const Real* __restrict values, int64_t n, const Factors factors, Real weight,
                              Sums<Real>& sums) {
  for (int64_t i = 0; i < n; ++i) {
    const Real value = static_cast<Real>(factors[i]) * values[i];
    const Real agreement = sums.side[i] * (kUnweighted ? values[i] : value);
    sums.total[i] += agreement < 0 ? Real{0} : value;
    if constexpr (kNormalize) sums.weight[i] += agreement > 0 ? weight : Real{0};
  }
}

template <class Real>
RTSVM_INLINE void divide(const Real* __restrict weight, int64_t n, Real least, Real* __restrict total) {
  for (int64_t i = 0; i < n; ++i) total[i] /= std::fabs(weight[i]) <= least ? Real{1} : weight[i];
}

template <class Real>
RTSVM_INLINE void survive(const Problem<Real>& problem, Task<Real>& task, int64_t chunk, int64_t first, int64_t n,
                          Slice<Real>& slice) {
  alignas(64) Real differences[kSlice];
  alignas(64) uint32_t words[kSlice];
  load_difference(task.view, problem.base, first, n, kUnclipped<Real>, slice.values);
  if (task.kept.used() || task.dropped.used()) std::memcpy(differences, slice.values, n * sizeof(Real));
  if (task.kept.used()) select(differences, slice.values, n, task.kept.threshold, task.kept.ties_left[chunk], true);
  if (task.dropped.used()) {
    select(differences, slice.values, n, task.dropped.threshold, task.dropped.ties_left[chunk], false);
  }
  if (task.mask != nullptr) cover(task.mask + first, slice.values, n);
  if (task.samples() || task.by_rank()) random_words(task.sampled, first, n, words);
  if (task.samples()) sample(words, slice.values, n, task.sampled.threshold);
  if (task.by_rank()) sample_ranked(words, task.ranked, first, n, slice.values, slice.factors);
}

// Calls body(factors) with the factors of a task.
template <class Real, class Body>
RTSVM_INLINE void with_factors(const Task<Real>& task, const Slice<Real>& slice, const Body& body) {
  if (task.by_rank()) {
    body(static_cast<const double*>(slice.factors));
  } else {
    body(Same{task.factor});
  }
}

template <class Real>
RTSVM_INLINE void elect(const Problem<Real>& problem, const Slice<Real>* slices, int64_t n, Sums<Real>& sums) {
  const int64_t count = static_cast<int64_t>(problem.tasks.size());
  const bool unweighted = problem.election == Election::kUnweighted;
  for (int64_t t = 0; t < count; ++t) {
    const Real* const values = slices[t].values;
    with_factors(problem.tasks[t], slices[t], [&](const auto factors) {
      if (problem.election == Election::kCount) {
        vote_once(values, n, factors, sums.votes);
      } else if (unweighted) {
        vote(values, n, Same{1}, sums.votes);
      } else {
        vote(values, n, factors, sums.votes);
      }
    });
  }
  decide(sums.votes, n, sums.side);
  for (int64_t t = 0; t < count; ++t) {
    const Real* const values = slices[t].values;
    const Real weight = problem.tasks[t].weight;
    with_factors(problem.tasks[t], slices[t], [&](const auto factors) {
      if (unweighted && problem.normalize) {
        add_elected<true, true>(values, n, factors, weight, sums);
      } else if (unweighted) {
        add_elected<true, false>(values, n, factors, weight, sums);
      } else if (problem.normalize) {
        add_elected<false, true>(values, n, factors, weight, sums);
      } else {
        add_elected<false, false>(values, n, factors, weight, sums);
      }
    });
  }
  if (problem.normalize) divide(sums.weight, n, problem.least, sums.total);
}

template <class Real>
RTSVM_INLINE void merge_chunk_any(Problem<Real>& problem, int64_t chunk) {
  alignas(64) Real base[kSlice];
  alignas(64) Real merged[kSlice];
  Sums<Real> sums;
  const bool elects = problem.election != Election::kNone;
  const int64_t count = static_cast<int64_t>(problem.tasks.size());
  const std::unique_ptr<Slice<Real>[]> slices(new Slice<Real>[elects ? count : 1]);
  const int64_t end = std::min((chunk + 1) * kChunk, problem.elements);
  for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
    const int64_t n = std::min(kSlice, end - first);
    std::memset(&sums, 0, offsetof(Sums<Real>, side));
    for (int64_t t = 0; t < count; ++t) {
      Slice<Real>& slice = slices[elects ? t : 0];
      survive(problem, problem.tasks[t], chunk, first, n, slice);
      if (elects) continue;
      with_factors(problem.tasks[t], slice, [&](const auto factors) { add(slice.values, n, factors, sums.total); });
    }
    if (elects) elect(problem, slices.get(), n, sums);
    load(problem.base, first, n, base);
    add_update(base, sums.total, n, problem.alpha, merged);
    store(merged, n, problem.type, problem.output, first);
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
  alignas(64) Real differences[kSlice];
  const int64_t end = std::min((chunk + 1) * kChunk, problem.elements);
  for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
    const int64_t n = std::min(kSlice, end - first);
    for (Task<Real>& task : problem.tasks) {
      if (!task.kept.counts_ties() && !task.dropped.counts_ties()) continue;
      load_difference(task.view, problem.base, first, n, kUnclipped<Real>, differences);
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
         const ElectOptions& options, void* output, ElementType type, int threads) {
  const int64_t elements = element_count(base);
  const int64_t chunks = chunk_count(elements);
  Problem<Real> problem{base,
                        {},
                        options.election,
                        options.normalize,
                        static_cast<Real>(options.least),
                        static_cast<Real>(options.alpha),
                        output,
                        type,
                        elements};
  bool counts_ties = false;
  for (int64_t t = 0; t < count; ++t) {
    problem.tasks.push_back(Task<Real>{tuned[t], static_cast<Real>(tasks[t].weight), tasks[t].factor,
                                       rule<Real>(tasks[t].kept, chunks), rule<Real>(tasks[t].dropped, chunks),
                                       tasks[t].sampled, tasks[t].ranked, tasks[t].mask});
    const Task<Real>& task = problem.tasks.back();
    counts_ties = counts_ties || task.kept.counts_ties() || task.dropped.counts_ties();
  }
  prefer_huge_pages(output, elements * element_bytes(type));
  // Chunks begin in order with every schedule. Each claims its ties as soon as it has counted them and all earlier
  // chunks have claimed theirs. This does not wait for merging, so the inputs are still in the cache when they are
  // merged.
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
                       const ElectOptions& options, void* output, ElementType type, int threads) {
  if (any_float64(base, tuned, count)) {
    run<double>(base, tuned, tasks, count, options, output, type, threads);
  } else {
    run<float>(base, tuned, tasks, count, options, output, type, threads);
  }
}

}  // namespace r_tsvm
