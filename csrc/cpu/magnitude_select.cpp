#include "r_tsvm/magnitude_select.h"

#include <algorithm>
#include <cmath>

#include "dtype.h"
#include "keep.h"
#include "selection.h"

namespace r_tsvm {
namespace {

int64_t sum_from(const std::vector<int64_t>& counts, int64_t first) {
  int64_t sum = 0;
  for (size_t digit = first; digit < counts.size(); ++digit) sum += counts[digit];
  return sum;
}

void write(const MagnitudeSelectOutput& output, double threshold, const Undecided& found) {
  *output.threshold = threshold;
  *output.ties = found.keep;
}

// Calls body(counters, first, n) for all blocks and returns the sums of what it counted.
template <class Body>
std::vector<int64_t> count(int64_t elements, int threads, bool halves, const Body& body) {
  const int64_t workers = worker_count(elements, threads);
  DigitCounters counters(workers, 1);
  for_chunks(workers, elements, threads, [&](int64_t worker, int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * kChunk, elements);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      body(counters.at(worker, 0), first, std::min(kBlock, end - first));
    }
  });
  return counters.take(0, halves);
}

template <class Half>
void run_16bit(const MatrixView& x, int64_t keep, int64_t infinity, const MagnitudeSelectOutput& output, int threads) {
  const auto counts = count(element_count(x), threads, true, [&](uint32_t* counters, int64_t first, int64_t n) {
    for_runs(x, first, n, [&](int64_t offset, int64_t run) {
      count_16bit(static_cast<const uint16_t*>(x.data) + offset, run, counters);
    });
  });
  *output.nonfinite = sum_from(counts, infinity);
  const Undecided found = pick(counts, keep);
  write(output, widened(Half{static_cast<uint16_t>(found.prefix)}), found);
}

template <class Real>
void run(const MatrixView& x, const MatrixView* base, int64_t keep, const MagnitudeSelectOutput& output, int threads) {
  const auto values_of = [&](int64_t first, int64_t n, Real* values) {
    load(x, first, n, values);
    if (base == nullptr) return;
    alignas(64) Real origin[kBlock];
    load(*base, first, n, origin);
    clipped_difference(origin, values, n, static_cast<Real>(INFINITY));
  };
  const auto top = count(element_count(x), threads, true, [&](uint32_t* counters, int64_t first, int64_t n) {
    alignas(64) Real values[kBlock];
    values_of(first, n, values);
    count_top_digits(values, n, counters);
  });
  *output.nonfinite = sum_from(top, Pattern<Real>::kInfinity >> kTopShift<Real>);
  Undecided found = pick(top, keep);
  for (int shift = kTopShift<Real> - kDigitBits; shift >= 0; shift -= kDigitBits) {
    const auto counts = count(element_count(x), threads, false, [&](uint32_t* counters, int64_t first, int64_t n) {
      alignas(64) Real values[kBlock];
      values_of(first, n, values);
      const int64_t least = found.prefix << (shift + kDigitBits);
      const Bracket bracket{least, least + (kDigits << shift) - 1};
      Positions positions;
      const int64_t inside = list_inside(values, n, bracket, positions);
      for (int64_t i = 0; i < inside; ++i) {
        ++counters[(magnitude_bits(values[positions.at[i]]) >> shift) & (kDigits - 1)];
      }
    });
    found = narrow(found, counts);
  }
  const auto bits = static_cast<typename Pattern<Real>::Int>(found.prefix);
  Real threshold;
  std::memcpy(&threshold, &bits, sizeof(threshold));
  write(output, static_cast<double>(threshold), found);
}

}  // namespace

void magnitude_select_cpu(const MatrixView& x, const MatrixView* base, int64_t keep,
                          const MagnitudeSelectOutput& output, int threads) {
  if (base == nullptr && x.type == ElementType::kBFloat16) {
    run_16bit<BFloat16>(x, keep, 0x7f80, output, threads);
  } else if (base == nullptr && x.type == ElementType::kFloat16) {
    run_16bit<Float16>(x, keep, 0x7c00, output, threads);
  } else if (base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1)) {
    run<double>(x, base, keep, output, threads);
  } else {
    run<float>(x, base, keep, output, threads);
  }
}

}  // namespace r_tsvm
