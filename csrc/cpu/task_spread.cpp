#include "r_tsvm/task_spread.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"

namespace r_tsvm {
namespace {

// A few task vectors of doubles stay within a 32 KiB L1 cache.
constexpr int64_t kSlice = 512;
static_assert(kChunk % kSlice == 0);

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
void run(const MatrixView& base, const MatrixView* tuned, int64_t count, double* spread, int threads) {
  const int64_t elements = element_count(base);
  prefer_huge_pages(spread, elements * sizeof(double));
  parallel_for(chunk_count(elements), elements * (count + 1), threads, [&](int64_t chunk) {
    alignas(64) Real origin[kSlice];
    alignas(64) Real values[kSlice];
    alignas(64) double mean[kSlice];
    std::vector<double> vectors(count * kSlice);
    const int64_t end = std::min((chunk + 1) * kChunk, elements);
    for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
      const int64_t n = std::min(kSlice, end - first);
      load(base, first, n, origin);
      std::memset(mean, 0, n * sizeof(double));
      for (int64_t t = 0; t < count; ++t) {
        load(tuned[t], first, n, values);
        difference(values, origin, n, vectors.data() + t * kSlice, mean);
      }
      divide(mean, n, static_cast<double>(count));
      std::memset(spread + first, 0, n * sizeof(double));
      for (int64_t t = 0; t < count; ++t) add_square(vectors.data() + t * kSlice, mean, n, spread + first);
    }
  });
}

}  // namespace

void task_spread_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count, double* spread, int threads) {
  (any_float64(base, tuned, count) ? run<double> : run<float>)(base, tuned, count, spread, threads);
}

}  // namespace r_tsvm
