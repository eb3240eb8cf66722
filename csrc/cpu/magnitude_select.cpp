#include "r_tsvm/magnitude_select.h"

#include <cmath>

#include "dtype.h"
#include "largest.h"

namespace r_tsvm {
namespace {

template <class Half>
void run_16bit(const MatrixView& x, const std::vector<int64_t>& keep, int64_t infinity,
               const MagnitudeSelectOutput& output, int threads) {
  const int64_t elements = element_count(x);
  const int64_t workers = worker_count(elements, threads);
  DigitCounters counters(workers, 1);
  for_blocks(workers, elements, threads, [&](int64_t worker, int64_t first, int64_t n) {
    for_runs(x, first, n, [&](int64_t offset, int64_t run) {
      count_16bit(static_cast<const uint16_t*>(x.data) + offset, run, counters.at(worker, 0));
    });
  });
  const std::vector<int64_t> counts = counters.take(0, true);
  *output.nonfinite = sum_from(counts, infinity);
  for (size_t k = 0; k < keep.size(); ++k) {
    const Undecided found = pick(counts, keep[k]);
    output.threshold[k] = widened(Half{static_cast<uint16_t>(found.prefix)});
    output.ties[k] = found.keep;
  }
}

template <class Real>
void run(const MatrixView& x, const MatrixView* base, const std::vector<int64_t>& keep,
         const MagnitudeSelectOutput& output, int threads) {
  const auto values_of = [&](int64_t first, int64_t n, Real* values) {
    load(x, first, n, values);
    if (base == nullptr) return;
    alignas(64) Real origin[kBlock];
    load(*base, first, n, origin);
    clipped_difference(origin, values, n, static_cast<Real>(INFINITY));
  };
  LargestFinder<Real, decltype(values_of)> finder(element_count(x), threads, values_of);
  *output.nonfinite = finder.count();
  if (*output.nonfinite > 0) return;
  const std::vector<Undecided> found = finder.find(keep);
  for (size_t k = 0; k < keep.size(); ++k) {
    output.threshold[k] = magnitude_of<Real>(found[k]);
    output.ties[k] = found[k].keep;
  }
}

}  // namespace

void magnitude_select_cpu(const MatrixView& x, const MatrixView* base, const int64_t* keep, int64_t count,
                          const MagnitudeSelectOutput& output, int threads) {
  const std::vector<int64_t> numbers(keep, keep + count);
  if (base == nullptr && x.type == ElementType::kBFloat16) {
    run_16bit<BFloat16>(x, numbers, 0x7f80, output, threads);
  } else if (base == nullptr && x.type == ElementType::kFloat16) {
    run_16bit<Float16>(x, numbers, 0x7c00, output, threads);
  } else if (base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1)) {
    run<double>(x, base, numbers, output, threads);
  } else {
    run<float>(x, base, numbers, output, threads);
  }
}

}  // namespace r_tsvm
