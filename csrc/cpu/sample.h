// A guess at a threshold from a few elements. It decides what is quick, never what comes out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "keep.h"
#include "selection.h"

namespace r_tsvm {

// Short runs of neighbours at scattered places.
inline constexpr int64_t kRun = 16;

// How many runs, at most `most`, represent so many elements; 0 for tensors too small for it.
inline int64_t sample_runs(int64_t elements, int64_t most) {
  const int64_t runs = std::min<int64_t>(elements / (16 * kRun), most);
  return runs >= 256 ? runs : 0;
}

// An even spread, moved by a hash so that no column of the matrix is met more often than others.
inline int64_t run_start(int64_t run, int64_t runs, int64_t elements) {
  const int64_t stride = elements / runs;
  const uint64_t hash = (static_cast<uint64_t>(run) + 1) * 0x9e3779b97f4a7c15u;
  return run * stride + static_cast<int64_t>((hash >> 32) % static_cast<uint64_t>(stride - kRun + 1));
}

struct ThresholdGuess {
  Bracket bracket;
  int64_t threshold;
  double tie_share;  // of the elements equal to the threshold, the share that survives
};

template <class Real>
ThresholdGuess guess_threshold(std::vector<Real>& sample, double kept) {
  // Five standard deviations of the rank for independent elements; neighbours depend on each other.
  const double size = static_cast<double>(sample.size());
  const double margin = 5 * std::sqrt(kept * (1 - kept) * size) + 5;
  const auto larger = [](Real a, Real b) { return magnitude_bits(a) > magnitude_bits(b); };
  // Between places known before: each makes the search for the next one shorter.
  auto first = sample.begin(), last = sample.end();
  const auto at = [&](double place) {
    const auto nth = sample.begin() + static_cast<int64_t>(place);
    if (nth != last) std::nth_element(first, nth, last, larger);
    return nth;
  };
  const double rank = kept * size;
  ThresholdGuess guess{{0, Pattern<Real>::kInfinity - 1}, 0, 0};
  if (rank + margin < size) guess.bracket.least = magnitude_bits(*(last = at(rank + margin)));
  if (rank - margin >= 0) guess.bracket.most = magnitude_bits(*(first = at(rank - margin)));
  guess.threshold = magnitude_bits(*at(std::min(rank, size - 1)));
  int64_t above = 0, ties = 0;
  for (const Real value : sample) {
    above += magnitude_bits(value) > guess.threshold;
    ties += magnitude_bits(value) == guess.threshold;
  }
  guess.tie_share = std::clamp((rank - static_cast<double>(above)) / static_cast<double>(ties), 0.0, 1.0);
  return guess;
}

}  // namespace r_tsvm
