#include "r_tsvm/random_mask.h"

#include <algorithm>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "random_words.h"

namespace r_tsvm {
namespace {

static_assert(kBlock % kWordGroup == 0);

constexpr int kCounters = kWordGroup / 4;

RTSVM_ISA_CLONES void compare(const uint32_t* words, int64_t n, uint64_t threshold, uint8_t* output) {
  for (int64_t i = 0; i < n; ++i) output[i] = words[i] < threshold ? 1 : 0;
}

}  // namespace

// Processes many counters at once, over which the compiler vectorises.
RTSVM_ISA_CLONES void random_words(const RandomMask& mask, int64_t first, int64_t n, uint32_t* words) {
  for (int64_t done = 0; done < n; done += kWordGroup) {
    const uint64_t counter = (mask.first + static_cast<uint64_t>(first + done)) / 4;
    uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      x0[i] = static_cast<uint32_t>(counter + i);
      x1[i] = static_cast<uint32_t>((counter + i) >> 32);
      x2[i] = mask.substream;
      x3[i] = 0;
    }
    PhiloxKey key = philox_key(mask.seed);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) philox_round(key, x0[i], x1[i], x2[i], x3[i]);
      key = next_round(key);
    }
    for (int i = 0; i < kCounters; ++i) {
      words[done + 4 * i] = x0[i];
      words[done + 4 * i + 1] = x1[i];
      words[done + 4 * i + 2] = x2[i];
      words[done + 4 * i + 3] = x3[i];
    }
  }
}

void random_mask_cpu(uint8_t* output, int64_t elements, const RandomMask& mask, int threads) {
  prefer_huge_pages(output, elements);
  parallel_for(chunk_count(elements), elements, threads, [&](int64_t chunk) {
    alignas(64) uint32_t words[kBlock];
    const int64_t end = std::min((chunk + 1) * kChunk, elements);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      const int64_t n = std::min(kBlock, end - first);
      random_words(mask, first, n, words);
      compare(words, n, mask.threshold, output + first);
    }
  });
}

}  // namespace r_tsvm
