// Of equal magnitudes, the first ones by flat index are kept. They are counted per slice, and a running sum gives each
// slice its quota. Elements are ranked only in the one slice where the quota ends.
#pragma once

#include <cmath>

#include "reduce.cuh"
#include "slices.cuh"

namespace r_tsvm {

inline constexpr int kEveryTie = 0x7fffffff;
inline constexpr int kQuotaThreads = 1024;

// Several selections: rule r keeps magnitudes above threshold[r], and the first ties[r] of those equal to it.
struct TieRules {
  const double* threshold;  // on the device, as the rest
  const int64_t* ties;
  const int64_t* tied;  // how many are equal to it; null if that is not known
  int* quotas;          // (rules, slices)
  int64_t slices;
};

// Whether a rule may keep some of its tied elements and not others.
__device__ inline bool is_open(const TieRules& rules, int rule) {
  const int64_t ties = rules.ties[rule];
  return ties > 0 && (rules.tied == nullptr || ties < rules.tied[rule]);
}

// Adds to the slice's number of tied elements, for an open rule. The whole block must call it. Most warps find none, so
// nothing waits for the others.
template <class Real>
__device__ inline void count_ties(const TieRules& rules, int rule, const Real (&values)[kItems], int64_t slice,
                                  int64_t elements) {
  const Real threshold = static_cast<Real>(rules.threshold[rule]);
  int tied = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const bool equal = first_item(slice) + j < elements && fabs(values[j]) == threshold;
    tied += __popc(__ballot_sync(0xffffffffu, equal));
  }
  if (tied > 0 && threadIdx.x % 32 == 0) atomicAdd(&rules.quotas[rule * rules.slices + slice], tied);
}

// Before count_ties.
inline void clear_ties(const Queue& queue, const TieRules& rules, int64_t count) {
  check(cudaMemsetAsync(rules.quotas, 0, static_cast<size_t>(count * rules.slices) * sizeof(int), queue.stream),
        queue.op, "cannot clear the counts of ties");
}

// Thread block r: turns the counts of rule r into quotas.
static __global__ void __launch_bounds__(kQuotaThreads) quota_kernel(const __grid_constant__ TieRules rules) {
  constexpr int kEach = 8;
  const int rule = blockIdx.x;
  if (!is_open(rules, rule)) return;
  int64_t left = rules.ties[rule];
  for (int64_t first = 0; first < rules.slices; first += kQuotaThreads * kEach) {
    const int64_t mine = first + static_cast<int64_t>(threadIdx.x) * kEach;
    int* quotas = rules.quotas + rule * rules.slices + mine;
    int counts[kEach];
    int64_t sum = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      counts[i] = mine + i < rules.slices ? quotas[i] : 0;
      sum += counts[i];
    }
    int64_t unclaimed = left - block_scan<kQuotaThreads>(sum, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t quota = counts[i] <= unclaimed ? kEveryTie : unclaimed > 0 ? unclaimed : 0;
      if (mine + i < rules.slices) quotas[i] = static_cast<int>(quota);
      unclaimed -= counts[i];
    }
    left -= total;
  }
}

// selected[j] = whether the rule keeps value j of the thread. The whole block must call it.
template <class Real>
__device__ inline void select(const TieRules& rules, int rule, const Real (&values)[kItems], int64_t slice,
                              bool (&selected)[kItems]) {
  const Real threshold = static_cast<Real>(rules.threshold[rule]);
  int quota = rules.ties[rule] > 0 ? kEveryTie : 0;
  if (is_open(rules, rule)) quota = rules.quotas[rule * rules.slices + slice];
  if (quota == 0 || quota == kEveryTie) {
    const bool every = quota == kEveryTie;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const Real magnitude = fabs(values[j]);
      selected[j] = magnitude > threshold || (every && magnitude == threshold);
    }
    return;
  }
  int tied = 0, total = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) tied += fabs(values[j]) == threshold ? 1 : 0;
  int rank = block_scan<kThreads>(tied, total);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const Real magnitude = fabs(values[j]);
    const bool is_tied = magnitude == threshold;
    selected[j] = magnitude > threshold || (is_tied && rank < quota);
    rank += is_tied ? 1 : 0;
  }
}

}  // namespace r_tsvm
