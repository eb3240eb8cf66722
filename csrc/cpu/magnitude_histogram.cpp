#include "r_tsvm/magnitude_histogram.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "largest.h"

namespace r_tsvm {
namespace {

template <class Real>
RTSVM_INLINE void digits_any(const Real* __restrict values, int64_t n, int shift, uint16_t mask,
                             uint16_t* __restrict digits) {
  for (int64_t i = 0; i < n; ++i) digits[i] = static_cast<uint16_t>(magnitude_bits(values[i]) >> shift) & mask;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void digits_of(const float* values, int64_t n, int shift, uint16_t mask, uint16_t* digits) {
  digits_any(values, n, shift, mask, digits);
}
RTSVM_ISA_CLONES void digits_of(const double* values, int64_t n, int shift, uint16_t mask, uint16_t* digits) {
  digits_any(values, n, shift, mask, digits);
}

template <class Real>
void run(const MatrixView& x, const MatrixView* base, const Digit& digit, int64_t* counts, int threads) {
  const int64_t elements = element_count(x);
  const int64_t workers = worker_count(elements, threads);
  const int64_t bins = int64_t{1} << digit.bits;
  const auto mask = static_cast<uint16_t>(bins - 1);
  const Bracket bracket = bracket_of(digit.prefix, digit.shift + digit.bits);
  const bool all = digit.shift + digit.bits == 8 * static_cast<int>(sizeof(Real)) - 1;
  // Neighbours are counted apart: an increment that waits for the one before it, as equal values would cause, is slow.
  std::vector<uint32_t> counters(workers * 2 * bins);
  for_blocks(workers, elements, threads, [&](int64_t worker, int64_t first, int64_t n) {
    alignas(64) Real values[kBlock];
    alignas(64) uint16_t digits[kBlock + 1];
    load(x, first, n, values);
    if (base != nullptr) {
      alignas(64) Real origin[kBlock];
      load(*base, first, n, origin);
      clipped_difference(origin, values, n, static_cast<Real>(INFINITY));
    }
    if (!all) {  // those with the prefix come to the front
      Positions positions;
      n = list_inside(values, n, bracket, positions);
      for (int64_t i = 0; i < n; ++i) values[i] = values[positions.at[i]];
    }
    digits_of(values, n, digit.shift, mask, digits);
    uint32_t* const even = counters.data() + worker * 2 * bins;
    uint32_t* const odd = even + bins;
    if (n % 2 == 1) ++even[digits[n - 1]];
    for (int64_t i = 0; i + 2 <= n; i += 2) {
      ++even[digits[i]];
      ++odd[digits[i + 1]];
    }
  });
  std::fill_n(counts, bins, int64_t{0});
  for (size_t i = 0; i < counters.size(); ++i) counts[i % bins] += counters[i];
}

}  // namespace

void magnitude_histogram_cpu(const MatrixView& x, const MatrixView* base, const Digit& digit, int64_t* counts,
                             int threads) {
  if (base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1)) {
    run<double>(x, base, digit, counts, threads);
  } else {
    run<float>(x, base, digit, counts, threads);
  }
}

}  // namespace r_tsvm
