// Finds the keep-th largest magnitude, digit by digit, of magnitudes that are computed block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
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

// Finds the keep-th largest magnitude for one or more numbers. values_of(first, n, values) writes a block; it is called
// twice per block, and in float64 up to four times where many magnitudes share their upper 16 bits.
template <class Real, class ValuesOf>
class LargestFinder {
 public:
  LargestFinder(int64_t elements, int threads, const ValuesOf& values_of)
      : elements_(elements), threads_(threads), workers_(worker_count(elements, threads)), values_of_(values_of) {}

  // The first pass. Returns the number of NaN and infinite values. If it is not 0, there is nothing to find.
  int64_t count() {
    DigitCounters counters(workers_, 1);
    for_blocks(workers_, elements_, threads_, [&](int64_t worker, int64_t first, int64_t n) {
      alignas(64) Real values[kBlock];
      values_of_(first, n, values);
      count_top_digits(values, n, counters.at(worker, 0));
    });
    top_ = counters.take(0, true);
    return sum_from(top_, Pattern<Real>::kInfinity >> kTopShift<Real>);
  }

  // Returns for each entry of `keep` the magnitude (as `prefix`), how many equal magnitudes are kept, and their number.
  std::vector<Undecided> find(const std::vector<int64_t>& keep) const {
    std::vector<Undecided> found;
    int64_t undecided = 0;
    for (const int64_t number : keep) {
      found.push_back(pick(top_, number));
      undecided += found.back().count;
    }
    if (undecided <= elements_ / 8) {
      settle(found);
    } else {
      count_lower_digits(found);
    }
    return found;
  }

 private:
  using Int = typename Pattern<Real>::Int;

  // Calls body(worker, k, values, positions, number) with the values whose upper bits, all but `shift`, are those
  // found.
  template <class Body>
  void for_undecided(const std::vector<Undecided>& found, int shift, const Body& body) const {
    for_blocks(workers_, elements_, threads_, [&](int64_t worker, int64_t first, int64_t n) {
      alignas(64) Real values[kBlock];
      Positions positions;
      values_of_(first, n, values);
      for (size_t k = 0; k < found.size(); ++k) {
        const int64_t inside = list_inside(values, n, bracket_of(found[k].prefix, shift), positions);
        body(worker, k, values, positions, inside);
      }
    });
  }

  // A few magnitudes are undecided: gather and partly sort them.
  void settle(std::vector<Undecided>& found) const {
    std::vector<std::vector<std::vector<Int>>> gathered(workers_, std::vector<std::vector<Int>>(found.size()));
    for_undecided(found, kTopShift<Real>,
                  [&](int64_t worker, size_t k, const Real* values, const Positions& positions, int64_t inside) {
                    std::vector<Int>& own = gathered[worker][k];
                    for (int64_t i = 0; i < inside; ++i) own.push_back(magnitude_bits(values[positions.at[i]]));
                  });
    for (size_t k = 0; k < found.size(); ++k) {
      std::vector<Int> all;
      all.reserve(found[k].count);
      for (auto& own : gathered) all.insert(all.end(), own[k].begin(), own[k].end());
      if (all.empty()) continue;  // nothing is kept
      const auto place = all.begin() + std::max<int64_t>(found[k].keep - 1, 0);
      std::nth_element(all.begin(), place, all.end(), std::greater<Int>());
      const Int bits = *place;
      const int64_t above = std::count_if(all.begin(), place, [&](Int other) { return other > bits; });
      found[k] = Undecided{bits, found[k].keep - above, std::count(all.begin(), all.end(), bits)};
    }
  }

  void count_lower_digits(std::vector<Undecided>& found) const {
    DigitCounters counters(workers_, static_cast<int64_t>(found.size()));
    for (int shift = kTopShift<Real> - kDigitBits; shift >= 0; shift -= kDigitBits) {
      for_undecided(found, shift + kDigitBits,
                    [&](int64_t worker, size_t k, const Real* values, const Positions& positions, int64_t inside) {
                      uint32_t* const digits = counters.at(worker, static_cast<int64_t>(k));
                      for (int64_t i = 0; i < inside; ++i) {
                        ++digits[(magnitude_bits(values[positions.at[i]]) >> shift) & (kDigits - 1)];
                      }
                    });
      for (size_t k = 0; k < found.size(); ++k) {
        found[k] = narrow(found[k], counters.take(static_cast<int64_t>(k), false));
      }
    }
  }

  const int64_t elements_;
  const int threads_;
  const int64_t workers_;
  const ValuesOf& values_of_;
  std::vector<int64_t> top_;
};

template <class Real>
Real magnitude_of(const Undecided& found) {
  const auto bits = static_cast<typename Pattern<Real>::Int>(found.prefix);
  Real magnitude;
  std::memcpy(&magnitude, &bits, sizeof(magnitude));
  return magnitude;
}

}  // namespace r_tsvm
