#include "r_tsvm/task_spread.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "spread.h"

namespace r_tsvm {
namespace {

// A few task vectors of doubles stay within a 32 KiB L1 cache.
constexpr int64_t kSlice = 512;
// Up to so many task vectors stay in registers.
constexpr int64_t kFew = 4;

// The same order of operations as for many tasks.
template <int kTasks, class Real>
RTSVM_INLINE void spread_of_few(const Real* __restrict values, const Real* __restrict base, int64_t n,
                                double* __restrict spread) {
  for (int64_t i = 0; i < n; ++i) {
    double vectors[kTasks], sum = 0;
    for (int t = 0; t < kTasks; ++t) {
      const Real difference = values[t * kSlice + i] - base[i];
      vectors[t] = static_cast<double>(difference);
      sum += vectors[t];
    }
    const double mean = sum / kTasks;
    spread[i] = 0;
    for (int t = 0; t < kTasks; ++t) {
      const double distance = vectors[t] - mean;
      spread[i] += distance * distance;
    }
  }
}

template <class Real>
RTSVM_INLINE void few_any(const Real* values, const Real* base, int64_t tasks, int64_t n, double* spread) {
  if (tasks == 1) return spread_of_few<1>(values, base, n, spread);
  if (tasks == 2) return spread_of_few<2>(values, base, n, spread);
  if (tasks == 3) return spread_of_few<3>(values, base, n, spread);
  spread_of_few<4>(values, base, n, spread);
}

// Differences are rounded to Real, then widened.
template <class Real>
RTSVM_INLINE void difference_any(const Real* __restrict values, const Real* __restrict base, int64_t n,
                                 double* __restrict vector, double* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    const Real difference = values[i] - base[i];
    vector[i] = static_cast<double>(difference);
    sum[i] += vector[i];
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void few(const float* values, const float* base, int64_t tasks, int64_t n, double* spread) {
  few_any(values, base, tasks, n, spread);
}
RTSVM_ISA_CLONES void few(const double* values, const double* base, int64_t tasks, int64_t n, double* spread) {
  few_any(values, base, tasks, n, spread);
}
RTSVM_ISA_CLONES void difference(const float* values, const float* base, int64_t n, double* vector, double* sum) {
  difference_any(values, base, n, vector, sum);
}
RTSVM_ISA_CLONES void difference(const double* values, const double* base, int64_t n, double* vector, double* sum) {
  difference_any(values, base, n, vector, sum);
}

RTSVM_ISA_CLONES void divide(double* values, int64_t n, double divisor) {
  for (int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

RTSVM_ISA_CLONES void add_square(const double* __restrict vector, const double* __restrict mean, int64_t n,
                                 double* __restrict spread) {
  for (int64_t i = 0; i < n; ++i) {
    const double distance = vector[i] - mean[i];
    spread[i] += distance * distance;
  }
}

template <class Real>
void spread_any(const MatrixView& base, const MatrixView* tuned, int64_t count, int64_t begin, int64_t size,
                double* spread) {
  alignas(64) Real origin[kSlice];
  alignas(64) Real values[kFew * kSlice];
  alignas(64) double mean[kSlice];
  std::vector<double> vectors(count > kFew ? count * kSlice : 0);
  for (int64_t done = 0; done < size; done += kSlice) {
    const int64_t first = begin + done, n = std::min(kSlice, size - done);
    load(base, first, n, origin);
    if (count <= kFew) {
      for (int64_t t = 0; t < count; ++t) load(tuned[t], first, n, values + t * kSlice);
      few(values, origin, count, n, spread + done);
      continue;
    }
    std::memset(mean, 0, n * sizeof(double));
    for (int64_t t = 0; t < count; ++t) {
      load(tuned[t], first, n, values);
      difference(values, origin, n, vectors.data() + t * kSlice, mean);
    }
    divide(mean, n, static_cast<double>(count));
    std::memset(spread + done, 0, n * sizeof(double));
    for (int64_t t = 0; t < count; ++t) add_square(vectors.data() + t * kSlice, mean, n, spread + done);
  }
}

}  // namespace

void spread_of(const MatrixView& base, const MatrixView* tuned, int64_t count, int64_t first, int64_t n,
               double* spread) {
  (any_float64(base, tuned, count) ? spread_any<double> : spread_any<float>)(base, tuned, count, first, n, spread);
}

void task_spread_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count, double* spread, int threads) {
  const int64_t elements = element_count(base);
  prefer_huge_pages(spread, elements * sizeof(double));
  parallel_for(chunk_count(elements), elements * (count + 1), threads, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk;
    spread_of(base, tuned, count, first, std::min(kChunk, elements - first), spread + first);
  });
}

}  // namespace r_tsvm
