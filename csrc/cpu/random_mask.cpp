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

RTSVM_ISA_CLONES void compare(const uint32_t* words, int64_t n, uint64_t threshold, uint8_t* output) {
  for (int64_t i = 0; i < n; ++i) output[i] = words[i] < threshold ? 1 : 0;
}

}  // namespace

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
