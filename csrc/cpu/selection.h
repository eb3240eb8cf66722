// Exact selection by counting digits of magnitudes. The bit pattern of a float without its sign, as an integer, is
// ordered like the magnitude. Counts are integers, so the result does not depend on how threads share the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "parallel.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

inline constexpr int kDigitBits = 16;
inline constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// Signed, because AVX2 compares signed integers only; magnitudes never use the top bit.
template <class Real>
struct Pattern;
template <>
struct Pattern<float> {
  using Int = int32_t;
  static constexpr int64_t kInfinity = 0x7f800000;
};
template <>
struct Pattern<double> {
  using Int = int64_t;
  static constexpr int64_t kInfinity = 0x7ff0000000000000;
};

template <class Real>
inline constexpr int kTopShift = 8 * sizeof(Real) - kDigitBits;

template <class Real>
inline typename Pattern<Real>::Int magnitude_bits(Real value) {
  typename Pattern<Real>::Int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & ~(static_cast<typename Pattern<Real>::Int>(1) << (8 * sizeof(Real) - 1));
}

// Counters of 16-bit digits for every worker and task.
class DigitCounters {
 public:
  DigitCounters(int64_t workers, int64_t tasks) : tasks_(tasks), counters_(workers * tasks * kDigits) {}

  uint32_t* at(int64_t worker, int64_t task) { return counters_.data() + (worker * tasks_ + task) * kDigits; }

  // Returns the sums over workers and sets the counters of the task to zero. With `halves`, count_top_digits filled
  // them, and the second half of the sums is zero.
  std::vector<int64_t> take(int64_t task, bool halves);

 private:
  int64_t tasks_;
  std::vector<uint32_t> counters_;
};

// Calls body(worker, chunk) for all chunks, which the workers share. No worker takes so many that a 32-bit counter
// could overflow.
inline constexpr int64_t kChunksPerWorker = (int64_t{1} << 31) / kChunk;

inline int64_t worker_count(int64_t elements, int threads) {
  const int64_t chunks = chunk_count(elements);
  const int64_t busy = elements < kParallelElements ? 1 : std::min<int64_t>(chunks, threads);
  return std::max<int64_t>({busy, (chunks + kChunksPerWorker - 1) / kChunksPerWorker, 1});
}

template <class Body>
void for_chunks(int64_t workers, int64_t elements, int threads, const Body& body) {
  const int64_t chunks = chunk_count(elements);
  std::atomic<int64_t> next{0};
  parallel_for(workers, elements, threads, [&](int64_t worker) {
    for (int64_t taken = 0; taken < kChunksPerWorker; ++taken) {
      const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) return;
      body(worker, chunk);
    }
  });
}

// The undecided magnitudes: those whose upper bits are `prefix`. Larger ones survive, smaller ones do not, and `keep`
// of these `count` survive.
struct Undecided {
  int64_t prefix;
  int64_t keep;
  int64_t count;
};

// The bin of `counts` that holds the keep-th largest digit.
Undecided pick(const std::vector<int64_t>& counts, int64_t keep);

// The same for the next lower digit.
inline Undecided narrow(const Undecided& outer, const std::vector<int64_t>& counts) {
  Undecided inner = pick(counts, outer.keep);
  inner.prefix |= outer.prefix << kDigitBits;
  return inner;
}

// Replaces `values` by values - base, clipped at +-theta; by NaN if theta is NaN.
void clipped_difference(const float* base, float* values, int64_t n, float theta);
void clipped_difference(const double* base, double* values, int64_t n, double theta);

// Counts the top digits (15 bits, as the sign is gone) in the two halves of `counters`.
void count_top_digits(const float* values, int64_t n, uint32_t* counters);
void count_top_digits(const double* values, int64_t n, uint32_t* counters);
// The same for 16-bit floats, which have only the top digit.
void count_16bit(const uint16_t* values, int64_t n, uint32_t* counters);

}  // namespace r_tsvm
