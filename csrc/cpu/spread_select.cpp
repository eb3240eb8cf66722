#include "r_tsvm/spread_select.h"

#include <atomic>
#include <cmath>

#include "isa.h"
#include "largest.h"
#include "spread.h"

namespace r_tsvm {
namespace {

RTSVM_ISA_CLONES int64_t count_zeros(const double* values, int64_t n) {
  int64_t zeros = 0;
  for (int64_t i = 0; i < n; ++i) zeros += values[i] == 0 ? 1 : 0;
  return zeros;
}

}  // namespace

void spread_select_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count,
                       const std::function<int64_t(int64_t)>& keep_of, const MagnitudeSelectOutput& output,
                       int threads) {
  const int64_t elements = element_count(base);
  std::atomic<int64_t> zeros{0};  // of both passes; read after the first
  const auto values_of = [&](int64_t first, int64_t n, double* values) {
    spread_of(base, tuned, count, first, n, values);
    zeros.fetch_add(count_zeros(values, n), std::memory_order_relaxed);
  };
  LargestFinder<double, decltype(values_of)> finder(elements, threads, values_of);
  *output.threshold = INFINITY;
  *output.ties = 0;
  *output.nonfinite = finder.count();
  if (*output.nonfinite > 0) return;
  const int64_t keep = keep_of(elements - zeros.load());
  if (keep <= 0) return;
  const Undecided found = finder.find({keep})[0];
  *output.threshold = magnitude_of<double>(found);
  *output.ties = found.keep;
}

}  // namespace r_tsvm
