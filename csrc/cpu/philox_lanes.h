// Philox with one word in each 64-bit lane, of which the instruction for wide products reads the lower half: a round
// takes six instructions. Included once for each instruction set, within a namespace, and so without a guard.
// RTSVM_LANES is the number of lanes of a vector, RTSVM_WIDE_PRODUCT the instruction.

using Lanes = uint64_t __attribute__((vector_size(8 * RTSVM_LANES)));
// Enough independent rounds at a time to hide how long a product takes, and few enough for the registers.
constexpr int kVectors = RTSVM_LANES == 8 ? 4 : 2;
constexpr int64_t kWords = 4 * RTSVM_LANES * kVectors;
static_assert(kWordGroup % kWords == 0);

// The counter of each lane beside the first one, in the order that the final interleaving turns into 0, 1, 2, ...
#if RTSVM_LANES == 8
constexpr Lanes kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
#else
constexpr Lanes kOrder = {0, 2, 1, 3};
#endif

RTSVM_INLINE Lanes product(const Lanes& a, const Lanes& b) { return (Lanes)RTSVM_WIDE_PRODUCT(a, b); }

// The two words of each lane of `low` and `high`, one lane of each in turn.
RTSVM_INLINE void interleave(const Lanes& low, const Lanes& high, uint32_t* to) {
#if RTSVM_LANES == 8
  const Lanes even = __builtin_shufflevector(low, high, 0, 8, 2, 10, 4, 12, 6, 14);
  const Lanes odd = __builtin_shufflevector(low, high, 1, 9, 3, 11, 5, 13, 7, 15);
#else
  const Lanes even = __builtin_shufflevector(low, high, 0, 4, 2, 6);
  const Lanes odd = __builtin_shufflevector(low, high, 1, 5, 3, 7);
#endif
  std::memcpy(to, &even, sizeof even);
  std::memcpy(to + 2 * RTSVM_LANES, &odd, sizeof odd);
}

inline void random_words(const RandomMask& mask, int64_t first, int64_t n, uint32_t* words) {
  constexpr uint64_t kLow = 0xffffffffu;
  const Lanes zero = {};
  for (int64_t done = 0; done < n; done += kWords) {
    const uint64_t counter = (mask.first + static_cast<uint64_t>(first + done)) / 4;
    // The upper halves of lanes hold anything.
    Lanes x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      x0[i] = kOrder + (counter + static_cast<uint64_t>(RTSVM_LANES * i));
      x1[i] = x0[i] >> 32;
      x2[i] = zero + mask.substream;
      x3[i] = zero;
    }
    PhiloxKey key = philox_key(mask.seed);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kVectors; ++i) {
        const Lanes product0 = product(x0[i], zero + uint64_t{kPhiloxFactor0});
        const Lanes product2 = product(x2[i], zero + uint64_t{kPhiloxFactor2});
        x0[i] = (product2 >> 32) ^ x1[i] ^ (zero + uint64_t{key.low});
        x1[i] = product2;
        x2[i] = (product0 >> 32) ^ x3[i] ^ (zero + uint64_t{key.high});
        x3[i] = product0;
      }
      key = next_round(key);
    }
    for (int i = 0; i < kVectors; ++i) {
      interleave((x0[i] & kLow) | (x1[i] << 32), (x2[i] & kLow) | (x3[i] << 32), words + done + 4 * RTSVM_LANES * i);
    }
  }
}
