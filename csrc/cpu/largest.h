// Finds the keep-th largest magnitude, digit by digit, of magnitudes that are computed block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "keep.h"
#include "selection.h"

namespace r_tsvm {

// Calls body(worker, first, n) for all blocks. A worker makes one call at a time.
template <class Body>
void for_blocks(int64_t workers, int64_t elements, int threads, const Body& body) {
  for_chunks(workers, elements, threads, [&](int64_t worker, int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * kChunk, elements);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      body(worker, first, std::min(kBlock, end - first));
    }
  });
}

inline int64_t sum_from(const std::vector<int64_t>& counts, int64_t first) {
  int64_t sum = 0;
  for (size_t digit = first; digit < counts.size(); ++digit) sum += counts[digit];
  return sum;
}

// Returns for each entry of `keep` the magnitude (as `prefix`), how many equal magnitudes are kept, and how many there
// are. values_of(first, n, values) writes a block; it is called twice per block in float32 and four times in float64.
// The result is meaningless if `nonfinite`, the number of NaN and infinite values, is not 0.
template <class Real, class ValuesOf>
std::vector<Undecided> find_largest(int64_t elements, const std::vector<int64_t>& keep, int threads, int64_t& nonfinite,
                                    const ValuesOf& values_of) {
  const int64_t workers = worker_count(elements, threads);
  const int64_t count = static_cast<int64_t>(keep.size());
  DigitCounters counters(workers, count);
  for_blocks(workers, elements, threads, [&](int64_t worker, int64_t first, int64_t n) {
    alignas(64) Real values[kBlock];
    values_of(first, n, values);
    count_top_digits(values, n, counters.at(worker, 0));
  });
  const std::vector<int64_t> top = counters.take(0, true);
  nonfinite = sum_from(top, Pattern<Real>::kInfinity >> kTopShift<Real>);
  std::vector<Undecided> found;
  for (const int64_t number : keep) found.push_back(pick(top, number));
  if (nonfinite > 0) return found;
  for (int shift = kTopShift<Real> - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for_blocks(workers, elements, threads, [&](int64_t worker, int64_t first, int64_t n) {
      alignas(64) Real values[kBlock];
      Positions positions;
      values_of(first, n, values);
      for (int64_t k = 0; k < count; ++k) {
        const Bracket bracket = bracket_of(found[k].prefix, shift + kDigitBits);
        const int64_t inside = list_inside(values, n, bracket, positions);
        uint32_t* const digits = counters.at(worker, k);
        for (int64_t i = 0; i < inside; ++i) {
          ++digits[(magnitude_bits(values[positions.at[i]]) >> shift) & (kDigits - 1)];
        }
      }
    });
    for (int64_t k = 0; k < count; ++k) found[k] = narrow(found[k], counters.take(k, false));
  }
  return found;
}

template <class Real>
Real magnitude_of(const Undecided& found) {
  const auto bits = static_cast<typename Pattern<Real>::Int>(found.prefix);
  Real magnitude;
  std::memcpy(&magnitude, &bits, sizeof(magnitude));
  return magnitude;
}

}  // namespace r_tsvm
