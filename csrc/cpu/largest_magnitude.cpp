// Bits of magnitudes are compared as integers, above all others those of NaN.
#include "r_tsvm/largest_magnitude.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "dtype.h"
#include "isa.h"
#include "parallel.h"

namespace r_tsvm {
namespace {

template <class Int>
RTSVM_INLINE Int largest_any(const Int* words, int64_t n) {
  constexpr Int kMagnitude = static_cast<Int>(~Int{0}) >> 1;
  Int largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max<Int>(largest, words[i] & kMagnitude);
  return largest;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES uint16_t largest(const uint16_t* words, int64_t n) { return largest_any(words, n); }
RTSVM_ISA_CLONES uint32_t largest(const uint32_t* words, int64_t n) { return largest_any(words, n); }
RTSVM_ISA_CLONES uint64_t largest(const uint64_t* words, int64_t n) { return largest_any(words, n); }

template <class Int>
Int run(const MatrixView& x, int threads) {
  const int64_t elements = element_count(x);
  std::vector<Int> found(chunk_count(elements));
  parallel_for(chunk_count(elements), elements, threads, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk;
    for_runs(x, first, std::min(kChunk, elements - first), [&](int64_t offset, int64_t n) {
      found[chunk] = std::max(found[chunk], largest(static_cast<const Int*>(x.data) + offset, n));
    });
  });
  return found.empty() ? Int{0} : *std::max_element(found.begin(), found.end());
}

}  // namespace

double largest_magnitude_cpu(const MatrixView& x, int threads) {
  switch (x.type) {
    case ElementType::kFloat64: {
      const uint64_t bits = run<uint64_t>(x, threads);
      double value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case ElementType::kFloat32:
      return float_from_bits(run<uint32_t>(x, threads));
    case ElementType::kFloat16:
      return widened(Float16{run<uint16_t>(x, threads)});
    case ElementType::kBFloat16:
      return widened(BFloat16{run<uint16_t>(x, threads)});
  }
  return 0;
}

}  // namespace r_tsvm
