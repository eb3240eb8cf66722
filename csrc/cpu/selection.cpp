#include "selection.h"

#include <algorithm>
#include <cmath>

#include "isa.h"

namespace r_tsvm {
namespace {

template <class Real>
RTSVM_INLINE void clipped_difference_any(const Real* __restrict base, Real* __restrict values, int64_t n, Real theta) {
  for (int64_t i = 0; i < n; ++i) {
    Real value = values[i] - base[i];
    value = value < -theta ? -theta : value;
    values[i] = value > theta ? theta : value;
  }
}

template <class Real>
RTSVM_INLINE void top_digits_any(const Real* __restrict values, int64_t n, uint16_t* __restrict digits) {
  using Int = typename Pattern<Real>::Int;
  for (int64_t i = 0; i < n; ++i) {
    Int bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    digits[i] = static_cast<uint16_t>((bits >> kTopShift<Real>)&0x7fff);
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void difference(const float* base, float* values, int64_t n, float theta) {
  clipped_difference_any(base, values, n, theta);
}
RTSVM_ISA_CLONES void difference(const double* base, double* values, int64_t n, double theta) {
  clipped_difference_any(base, values, n, theta);
}
RTSVM_ISA_CLONES void top_digits(const float* values, int64_t n, uint16_t* digits) {
  top_digits_any(values, n, digits);
}
RTSVM_ISA_CLONES void top_digits(const double* values, int64_t n, uint16_t* digits) {
  top_digits_any(values, n, digits);
}

// Neighbours use separate counters. With one counter, equal values would make each increment wait for the one before.
void count_digits_of(const uint16_t* digits, int64_t n, uint32_t* counters) {
  uint32_t* const odd = counters + kDigits / 2;
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++counters[digits[i]];
    ++odd[digits[i + 1]];
  }
  if (i < n) ++counters[digits[i]];
}

template <class Real>
void clipped_difference_or_nan(const Real* base, Real* values, int64_t n, Real theta) {
  if (std::isnan(theta)) {
    std::fill_n(values, n, theta);
  } else {
    difference(base, values, n, theta);
  }
}

template <class Real>
void count_top_digits_any(const Real* values, int64_t n, uint32_t* counters) {
  alignas(64) uint16_t digits[kBlock];
  top_digits(values, n, digits);
  count_digits_of(digits, n, counters);
}

}  // namespace

std::vector<int64_t> DigitCounters::take(int64_t task, bool halves) {
  std::vector<int64_t> sums(kDigits);
  const int64_t mask = halves ? kDigits / 2 - 1 : kDigits - 1;
  const int64_t stride = tasks_ * kDigits;
  for (int64_t start = task * kDigits; start < static_cast<int64_t>(counters_.size()); start += stride) {
    for (int64_t digit = 0; digit < kDigits; ++digit) sums[digit & mask] += counters_[start + digit];
    std::fill_n(counters_.begin() + start, kDigits, 0u);
  }
  return sums;
}

Undecided pick(const std::vector<int64_t>& counts, int64_t keep) {
  int64_t digit = static_cast<int64_t>(counts.size()) - 1;
  // If nothing is kept, do not choose an empty bin: its digit may be one that no magnitude has.
  for (; digit > 0 && (counts[digit] < keep || counts[digit] == 0); --digit) keep -= counts[digit];
  return Undecided{digit, keep, counts[digit]};
}

void clipped_difference(const float* base, float* values, int64_t n, float theta) {
  clipped_difference_or_nan(base, values, n, theta);
}
void clipped_difference(const double* base, double* values, int64_t n, double theta) {
  clipped_difference_or_nan(base, values, n, theta);
}

void count_top_digits(const float* values, int64_t n, uint32_t* counters) { count_top_digits_any(values, n, counters); }
void count_top_digits(const double* values, int64_t n, uint32_t* counters) {
  count_top_digits_any(values, n, counters);
}

void count_16bit(const uint16_t* values, int64_t n, uint32_t* counters) {
  uint32_t* const odd = counters + kDigits / 2;
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++counters[values[i] & 0x7fff];
    ++odd[values[i + 1] & 0x7fff];
  }
  if (i < n) ++counters[values[i] & 0x7fff];
}

}  // namespace r_tsvm
