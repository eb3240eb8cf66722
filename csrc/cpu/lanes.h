// Independent partial sums, added pairwise at the end: the compiler vectorises without fast-math, and every instruction
// set adds in the same order.
#pragma once

#include <cstdint>

#include "isa.h"

namespace r_tsvm {

inline constexpr int kLanes = 16;

RTSVM_INLINE double add_lanes(double (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Calls step(i, lane) for i = 0 ... n - 1, lane = i % kLanes.
template <class Step>
RTSVM_INLINE void for_lanes(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) step(i + lane, lane);
  }
  for (int lane = 0; i + lane < n; ++lane) step(i + lane, lane);
}

}  // namespace r_tsvm
