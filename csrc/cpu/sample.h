// Guesses from a few elements. They affect the speed, never the selection.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "keep.h"
#include "selection.h"

namespace r_tsvm {

// Runs of neighbours at scattered places. A run of 16-bit floats is one cache line, if the tensor is aligned to one.
inline constexpr int64_t kRun = 32;

// Number of runs, at most `most`, that represent so many elements; 0 if the tensor is too small for a sample.
inline int64_t sample_runs(int64_t elements, int64_t most) {
  const int64_t runs = std::min<int64_t>(elements / (16 * kRun), most);
  return runs >= 128 ? runs : 0;
}

// Spreads the runs evenly and shifts them by a hash, so that no column of the matrix is sampled more often than others.
inline int64_t run_start(int64_t run, int64_t runs, int64_t elements) {
  const int64_t stride = elements / runs;
  const uint64_t hash = (static_cast<uint64_t>(run) + 1) * 0x9e3779b97f4a7c15u;
  const int64_t start = run * stride + static_cast<int64_t>((hash >> 32) % static_cast<uint64_t>(stride - kRun + 1));
  return start / kRun * kRun;
}

struct ThresholdGuess {
  Bracket bracket;
  int64_t threshold;
  double share;      // of the elements, those inside the bracket
  double tie_share;  // of the elements equal to the threshold, those that survive
};

// The magnitudes of a sample in descending order, one at a time.
template <class Real>
class Ranks {
 public:
  Ranks(const Real* sample, int64_t size) : sample_(sample), size_(size), counts_(int64_t{1} << kBits) {
    for (int64_t i = 0; i < size; ++i) ++counts_[magnitude_bits(sample[i]) >> kShift];
  }

  int64_t at(int64_t rank) const {
    const Undecided bin = pick(counts_, rank + 1);
    std::vector<typename Pattern<Real>::Int> inside;
    inside.reserve(bin.count);
    for (int64_t i = 0; i < size_; ++i) {
      const auto bits = magnitude_bits(sample_[i]);
      if (bits >> kShift == bin.prefix) inside.push_back(bits);
    }
    const auto nth = inside.end() - bin.keep;
    std::nth_element(inside.begin(), nth, inside.end());
    return *nth;
  }

 private:
  static constexpr int kBits = 12;
  static constexpr int kShift = 8 * sizeof(Real) - 1 - kBits;

  const Real* const sample_;
  const int64_t size_;
  std::vector<int64_t> counts_;  // by the upper bits
};

template <class Real>
ThresholdGuess guess_threshold(const Real* sample, int64_t size, double kept) {
  // Five standard deviations of the rank for independent elements, as a margin: neighbours are correlated.
  const double n = static_cast<double>(size);
  const double margin = 5 * std::sqrt(kept * (1 - kept) * n) + 5;
  const double rank = kept * n;
  const Ranks<Real> ranks(sample, size);
  ThresholdGuess guess{{0, Pattern<Real>::kInfinity - 1}, 0, 0, 0};
  if (rank + margin < n) guess.bracket.least = ranks.at(static_cast<int64_t>(rank + margin));
  if (rank - margin >= 0) guess.bracket.most = ranks.at(static_cast<int64_t>(rank - margin));
  guess.threshold = ranks.at(static_cast<int64_t>(std::min(rank, n - 1)));
  int64_t above = 0, ties = 0, inside = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t bits = magnitude_bits(sample[i]);
    above += bits > guess.threshold;
    ties += bits == guess.threshold;
    inside += bits >= guess.bracket.least && bits <= guess.bracket.most;
  }
  guess.share = static_cast<double>(inside) / n;
  guess.tie_share = std::clamp((rank - static_cast<double>(above)) / static_cast<double>(ties), 0.0, 1.0);
  return guess;
}

}  // namespace r_tsvm
