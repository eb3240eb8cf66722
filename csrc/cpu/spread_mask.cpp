#include "r_tsvm/spread_mask.h"

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "spread.h"

namespace r_tsvm {
namespace {

constexpr uint8_t kTied = 2;

// Returns how many are equal to the threshold; they are marked by kTied.
RTSVM_ISA_CLONES int64_t mark(const double* __restrict values, int64_t n, double threshold, uint8_t* __restrict mask) {
  int64_t tied = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = values[i] == threshold;
    tied += equal ? 1 : 0;
    mask[i] = static_cast<uint8_t>(values[i] > threshold ? 1 : equal ? kTied : 0);
  }
  return tied;
}

// Selects the first `ties` of the tied elements.
void settle(uint8_t* mask, int64_t n, int64_t ties) {
  for (int64_t i = 0; i < n; ++i) {
    if (mask[i] != kTied) continue;
    mask[i] = ties > 0 ? 1 : 0;
    --ties;
  }
}

RTSVM_ISA_CLONES void settle_all(uint8_t* mask, int64_t n, uint8_t value) {
  for (int64_t i = 0; i < n; ++i) mask[i] = mask[i] == kTied ? value : mask[i];
}

}  // namespace

void spread_mask_cpu(const MatrixView& base, const MatrixView* tuned, int64_t count, double threshold, int64_t ties,
                     uint8_t* mask, int threads) {
  const int64_t elements = element_count(base), chunks = chunk_count(elements);
  prefer_huge_pages(mask, elements);
  std::vector<int64_t> tied(chunks);  // in each chunk
  const auto size_of = [&](int64_t chunk) { return std::min(kChunk, elements - chunk * kChunk); };
  parallel_for(chunks, elements * (count + 1), threads, [&](int64_t chunk) {
    const int64_t end = chunk * kChunk + size_of(chunk);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      alignas(64) double spread[kBlock];
      const int64_t n = std::min(kBlock, end - first);
      spread_of(base, tuned, count, first, n, spread);
      tied[chunk] += mark(spread, n, threshold, mask + first);
    }
  });
  std::vector<int64_t> left(chunks);  // how many of a chunk's ties are selected, and those of all later ones
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    left[chunk] = ties;
    ties -= std::min(ties, tied[chunk]);
  }
  parallel_for(chunks, elements, threads, [&](int64_t chunk) {
    uint8_t* const part = mask + chunk * kChunk;
    if (tied[chunk] == 0) return;
    if (left[chunk] > 0 && left[chunk] < tied[chunk]) return settle(part, size_of(chunk), left[chunk]);
    settle_all(part, size_of(chunk), left[chunk] > 0 ? 1 : 0);
  });
}

}  // namespace r_tsvm
