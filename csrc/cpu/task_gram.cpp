#include "r_tsvm/task_gram.h"

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "lanes.h"
#include "parallel.h"

namespace r_tsvm {
namespace {

// A few task vectors of doubles stay within a 32 KiB L1 cache.
constexpr int64_t kSlice = 512;
static_assert(kChunk % kSlice == 0 && kSlice % kLanes == 0);

RTSVM_ISA_CLONES void subtract(double* __restrict values, const double* __restrict base, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] -= base[i];
}

RTSVM_ISA_CLONES void cover(double* __restrict values, const uint8_t* __restrict mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = mask[i] != 0 ? values[i] : 0.0;
}

RTSVM_ISA_CLONES double dot(const double* x, const double* y, int64_t n) {
  double lanes[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) { lanes[lane] += x[i] * y[i]; });
  return add_lanes(lanes);
}

}  // namespace

void task_gram_cpu(const MatrixView* tuned, int64_t count, const MatrixView* base, const uint8_t* mask, double* gram,
                   int threads) {
  const int64_t elements = element_count(tuned[0]);
  const int64_t chunks = chunk_count(elements);
  const int64_t pairs = count * (count + 1) / 2;
  std::vector<double> sums(chunks * pairs);
  parallel_for(chunks, elements * (count + 1), threads, [&](int64_t chunk) {
    alignas(64) double origin[kSlice];
    std::vector<double> vectors(count * kSlice);
    double* const chunk_sums = sums.data() + chunk * pairs;
    const int64_t end = std::min((chunk + 1) * kChunk, elements);
    for (int64_t first = chunk * kChunk; first < end; first += kSlice) {
      const int64_t n = std::min(kSlice, end - first);
      if (base != nullptr) load(*base, first, n, origin);
      for (int64_t t = 0; t < count; ++t) {
        double* const vector = vectors.data() + t * kSlice;
        load(tuned[t], first, n, vector);
        if (base != nullptr) subtract(vector, origin, n);
        if (mask != nullptr) cover(vector, mask + first, n);
      }
      double* sum = chunk_sums;
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t t = 0; t <= s; ++t) *sum++ += dot(vectors.data() + s * kSlice, vectors.data() + t * kSlice, n);
      }
    }
  });
  int64_t pair = 0;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t t = 0; t <= s; ++t, ++pair) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * pairs + pair];
      gram[s * count + t] = gram[t * count + s] = sum;
    }
  }
}

}  // namespace r_tsvm
