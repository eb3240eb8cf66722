// Philox4x32-10: random words that are a function of a counter and a key, and so the same on every device and in every
// tiling. J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "r_tsvm/host_device.h"

namespace r_tsvm {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxFactor2 = 0xCD9E8D57u;

struct PhiloxKey {
  uint32_t low;
  uint32_t high;
};

RTSVM_HOST_DEVICE inline PhiloxKey philox_key(uint64_t seed) {
  return PhiloxKey{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// Increments from the golden ratio and sqrt(3) - 1.
RTSVM_HOST_DEVICE inline PhiloxKey next_round(PhiloxKey key) {
  return PhiloxKey{key.low + 0x9E3779B9u, key.high + 0xBB67AE85u};
}

RTSVM_HOST_DEVICE inline void philox_round(PhiloxKey key, uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3) {
  const uint64_t product0 = uint64_t{kPhiloxFactor0} * x0;
  const uint64_t product2 = uint64_t{kPhiloxFactor2} * x2;
  x0 = static_cast<uint32_t>(product2 >> 32) ^ x1 ^ key.low;
  x1 = static_cast<uint32_t>(product2);
  x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key.high;
  x3 = static_cast<uint32_t>(product0);
}

// Replaces a counter by its four random words.
RTSVM_HOST_DEVICE inline void philox(PhiloxKey key, uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(key, x0, x1, x2, x3);
    key = next_round(key);
  }
}

// Element i of a tensor has word i % 4 of the counter (i / 4, substream, 0), under the key `seed`. The first entry of
// the counter takes two words, low one first. The element is kept if and only if its word is below this threshold, a
// number from 0 (never) to 2^32 (always). `first` is the index of the first element, a multiple of 4: not 0 if the
// tensor is a piece of a larger one.
struct RandomMask {
  uint64_t threshold;
  uint64_t seed;
  uint32_t substream;
  uint64_t first = 0;
};

}  // namespace r_tsvm
