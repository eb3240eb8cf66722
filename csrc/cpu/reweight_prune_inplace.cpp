// All thresholds first, then all writing: what is not finite is found before anything is lost.
#include "r_tsvm/reweight_prune_inplace.h"

#include <algorithm>

#include "isa.h"
#include "largest.h"

namespace r_tsvm {
namespace {

alignas(64) constexpr double kZeros64[kBlock] = {};
alignas(64) constexpr float kZeros32[kBlock] = {};
inline const float* zeros(float) { return kZeros32; }
inline const double* zeros(double) { return kZeros64; }

// Writes the values whose magnitude has at least the bits `from`, +0.0 in place of the others; returns how many
// magnitudes have the bits `tie`.
template <class Real>
RTSVM_INLINE int64_t prune_any(const Real* __restrict values, int64_t n, int64_t from, int64_t tie,
                               Real* __restrict kept) {
  using Int = typename Pattern<Real>::Int;
  const Int first_kept = static_cast<Int>(from);
  const Int exact = static_cast<Int>(tie);
  Int tied = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Int bits = magnitude_bits(values[i]);
    kept[i] = bits >= first_kept ? values[i] : Real{0};
    tied += bits == exact ? 1 : 0;
  }
  return tied;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES int64_t prune(const float* values, int64_t n, int64_t from, int64_t tie, float* kept) {
  return prune_any(values, n, from, tie, kept);
}
RTSVM_ISA_CLONES int64_t prune(const double* values, int64_t n, int64_t from, int64_t tie, double* kept) {
  return prune_any(values, n, from, tie, kept);
}

template <class Real>
class InplacePruning {
 public:
  InplacePruning(const InplacePruneTask& task, int64_t elements, int threads)
      : matrix_(static_cast<Real*>(task.matrix)),
        theta_(static_cast<Real>(task.theta)),
        keep_(task.keep),
        elements_(elements),
        threads_(threads) {}

  // Returns how many values are not finite.
  int64_t find() {
    found_ = Undecided{0, elements_, elements_};
    if (keep_ == elements_) return 0;
    int64_t nonfinite = 0;
    const auto values_of = [&](int64_t first, int64_t n, Real* values) { clipped(first, n, values); };
    found_ = find_largest<Real>(elements_, {std::max<int64_t>(keep_, 1)}, threads_, nonfinite, values_of)[0];
    if (keep_ == 0) found_ = Undecided{Pattern<Real>::kInfinity, 0, 0};
    return nonfinite;
  }

  void write() {
    const int64_t chunks = chunk_count(elements_);
    // By chunk, how many of the elements equal to the threshold survive.
    std::vector<int64_t> quotas(chunks, found_.keep == 0 ? 0 : elements_);
    if (0 < found_.keep && found_.keep < found_.count) {
      parallel_for(chunks, elements_, threads_, [&](int64_t chunk) { quotas[chunk] = count_ties(chunk); });
      int64_t left = found_.keep;
      for (int64_t& quota : quotas) {
        const int64_t tied = quota;
        quota = tied <= left ? elements_ : left;
        left -= std::min(tied, left);
      }
    }
    parallel_for(chunks, elements_, threads_, [&](int64_t chunk) { write(chunk, quotas[chunk]); });
  }

 private:
  void clipped(int64_t first, int64_t n, Real* values) const {
    std::copy_n(matrix_ + first, n, values);
    clipped_difference(zeros(Real{}), values, n, theta_);
  }

  // Calls body(first, n, values) for the blocks of a chunk.
  template <class Body>
  void for_chunk(int64_t chunk, const Body& body) const {
    alignas(64) Real values[kBlock];
    const int64_t end = std::min((chunk + 1) * kChunk, elements_);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      const int64_t n = std::min(kBlock, end - first);
      clipped(first, n, values);
      body(first, n, values);
    }
  }

  int64_t count_ties(int64_t chunk) const {
    int64_t ties = 0;
    for_chunk(chunk, [&](int64_t, int64_t n, const Real* values) {
      for (int64_t i = 0; i < n; ++i) ties += magnitude_bits(values[i]) == found_.prefix;
    });
    return ties;
  }

  void write(int64_t chunk, int64_t quota) {
    for_chunk(chunk, [&](int64_t first, int64_t n, const Real* values) {
      const int64_t from = quota > 0 ? found_.prefix : found_.prefix + 1;
      quota -= prune(values, n, from, found_.prefix, matrix_ + first);
      for (int64_t i = n - 1; quota < 0 && from == found_.prefix; --i) {  // the last ones were too many
        if (magnitude_bits(values[i]) != found_.prefix) continue;
        matrix_[first + i] = 0;
        ++quota;
      }
    });
  }

  Real* const matrix_;
  const Real theta_;
  const int64_t keep_;
  const int64_t elements_;
  const int threads_;
  Undecided found_{};
};

template <class Real>
void run(const InplacePruneTask* tasks, int64_t count, int64_t elements, int threads) {
  std::vector<InplacePruning<Real>> prunings;
  int64_t nonfinite = 0;
  for (int64_t task = 0; task < count; ++task) {
    prunings.emplace_back(tasks[task], elements, threads);
    nonfinite += *tasks[task].nonfinite = prunings.back().find();
  }
  if (nonfinite > 0) return;
  for (InplacePruning<Real>& pruning : prunings) pruning.write();
}

}  // namespace

void reweight_prune_inplace_cpu(const InplacePruneTask* tasks, int64_t count, int64_t elements, ElementType type,
                                int threads) {
  if (type == ElementType::kFloat64) {
    run<double>(tasks, count, elements, threads);
  } else {
    run<float>(tasks, count, elements, threads);
  }
}

}  // namespace r_tsvm
