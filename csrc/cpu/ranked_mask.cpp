// Counts the elements of a row in buckets of magnitudes, which bounds the rank of each. If the thresholds at both
// bounds give the same decision, the rank does not matter. The few elements that remain are compared with all others of
// the row. If many remain (rows with few different values), the row is sorted.
#include "r_tsvm/ranked_mask.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "lanes.h"
#include "random_words.h"
#include "row_sorter.h"

namespace r_tsvm {
namespace {

// Elements for each bucket, and the multiple of the mean magnitude that all buckets but the last span.
constexpr int64_t kPerBucket = 4;
constexpr double kSpan = 4;
// A float represents the number of every bucket exactly; rounding up would put the last one beyond the end.
constexpr int64_t kMostBuckets = int64_t{1} << 20;
static_assert(kMostBuckets <= int64_t{1} << 24);
// Comparing this many elements of a row with all others takes about as long as sorting it.
constexpr int64_t kMostUndecided = 100;

constexpr uint64_t kAlways = uint64_t{1} << 32;

template <class Key>
struct RealOf;
template <>
struct RealOf<uint32_t> {
  using Type = float;
};
template <>
struct RealOf<uint64_t> {
  using Type = double;
};

// The magnitude that has these bits.
template <class Key>
RTSVM_INLINE typename RealOf<Key>::Type magnitude(Key key) {
  typename RealOf<Key>::Type value;
  std::memcpy(&value, &key, sizeof(key));
  return value;
}

template <class Key>
RTSVM_INLINE double sum_any(const Key* keys, int64_t n) {
  double lanes[kLanes] = {};
  for_lanes(n, [&](int64_t i, int lane) { lanes[lane] += static_cast<double>(magnitude(keys[i])); });
  return add_lanes(lanes);
}

// Buckets rise with the magnitudes, because rounding of products is monotonic.
template <class Key, class Real>
RTSVM_INLINE void buckets_of_any(const Key* __restrict keys, int64_t n, Real scale, int32_t last,
                                 int32_t* __restrict buckets) {
  const Real most = static_cast<Real>(last);
  for (int64_t i = 0; i < n; ++i) {
    const Real place = magnitude(keys[i]) * scale;
    buckets[i] = static_cast<int32_t>(place < most ? place : most);
  }
}

// The rank of element `at`, by the definition.
template <class Key>
RTSVM_INLINE int64_t rank_any(const Key* keys, int64_t n, int64_t at) {
  const Key key = keys[at];
  int64_t below = 0;
  for (int64_t i = 0; i < at; ++i) below += keys[i] < key ? 1 : 0;
  for (int64_t i = at + 1; i < n; ++i) below += keys[i] <= key ? 1 : 0;
  return below;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES double sum_of(const uint32_t* keys, int64_t n) { return sum_any(keys, n); }
RTSVM_ISA_CLONES double sum_of(const uint64_t* keys, int64_t n) { return sum_any(keys, n); }
RTSVM_ISA_CLONES void buckets_of(const uint32_t* keys, int64_t n, float scale, int32_t last, int32_t* buckets) {
  buckets_of_any(keys, n, scale, last, buckets);
}
RTSVM_ISA_CLONES void buckets_of(const uint64_t* keys, int64_t n, double scale, int32_t last, int32_t* buckets) {
  buckets_of_any(keys, n, scale, last, buckets);
}
RTSVM_ISA_CLONES int64_t rank_of(const uint32_t* keys, int64_t n, int64_t at) { return rank_any(keys, n, at); }
RTSVM_ISA_CLONES int64_t rank_of(const uint64_t* keys, int64_t n, int64_t at) { return rank_any(keys, n, at); }

// Words below `alive` survive, those above `dead` do not; alive - 1 <= dead.
struct Limits {
  uint32_t alive;
  uint32_t dead;
};

enum Verdict : uint8_t { kDead = 0, kUndecided = 1, kAlive = 2 };

// Without branches, because random words are unpredictable.
void judge(const uint32_t* words, const int32_t* buckets, const Limits* limits, int64_t n, uint8_t* verdicts) {
  for (int64_t i = 0; i < n; ++i) {
    const Limits limit = limits[buckets[i]];
    verdicts[i] = static_cast<uint8_t>((words[i] < limit.alive ? 1 : 0) + (words[i] <= limit.dead ? 1 : 0));
  }
}

// Returns the number of undecided ones.
RTSVM_ISA_CLONES int64_t mark_alive(const uint8_t* __restrict verdicts, int64_t n, uint8_t* __restrict mask) {
  int32_t undecided = 0;
  for (int64_t i = 0; i < n; ++i) {
    mask[i] = verdicts[i] == kAlive ? 1 : 0;
    undecided += verdicts[i] == kUndecided ? 1 : 0;
  }
  return undecided;
}

template <class Key>
class RowDrawer {
 public:
  RowDrawer(const int64_t* thresholds, int64_t cols)
      : thresholds_(thresholds),
        cols_(cols),
        sorter_(cols),
        ranks_(cols),
        words_(cols + 4 + kWordGroup),
        buckets_(cols),
        verdicts_(cols),
        counts_(std::min(cols / kPerBucket + 1, kMostBuckets)),
        by_rank_(cols),
        by_bucket_(counts_.size()) {
    for (int64_t rank = 0; rank < cols; ++rank) {
      const uint64_t threshold = static_cast<uint64_t>(thresholds[rank]);
      // The limits have 32 bits, so the smallest word at threshold 0 and the largest at 2^32 are in neither range:
      // undecided.
      by_rank_[rank] = Limits{static_cast<uint32_t>(std::min(threshold, kAlways - 1)),
                              static_cast<uint32_t>(std::max<uint64_t>(threshold, 1) - 1)};
    }
  }

  Key* keys() { return sorter_.keys(); }

  // `first` is the flat index of the row's first element; the keys are finite.
  void draw(const RandomMask& drawn, int64_t first, uint8_t* mask) {
    const int64_t aligned = first / 4 * 4;
    random_words(drawn, aligned, first - aligned + cols_, words_.data());
    const uint32_t* const words = words_.data() + (first - aligned);
    if (!find_intervals()) return draw_sorted(words, mask);
    judge(words, buckets_.data(), by_bucket_.data(), cols_, verdicts_.data());
    const int64_t undecided = mark_alive(verdicts_.data(), cols_, mask);
    if (undecided == 0) return;
    if (undecided > kMostUndecided) return draw_sorted(words, mask);
    for (int64_t i = 0; i < cols_; ++i) {
      if (verdicts_[i] == kUndecided) mask[i] = words[i] < thresholds_[rank_of(keys(), cols_, i)] ? 1 : 0;
    }
  }

 private:
  // Fills buckets_ and by_bucket_. Returns false if there is no scale for them.
  bool find_intervals() {
    const int64_t size = static_cast<int64_t>(counts_.size());
    const double mean = sum_of(keys(), cols_) / static_cast<double>(cols_);
    const auto scale = static_cast<typename RealOf<Key>::Type>(static_cast<double>(size) / (kSpan * mean));
    if (!(scale > 0 && std::isfinite(scale))) return false;
    buckets_of(keys(), cols_, scale, static_cast<int32_t>(size - 1), buckets_.data());
    std::fill(counts_.begin(), counts_.end(), 0);
    for (int64_t i = 0; i < cols_; ++i) ++counts_[buckets_[i]];
    int64_t start = 0;
    for (int64_t bucket = 0; bucket < size; ++bucket) {
      const int64_t end = start + counts_[bucket];
      // The value of an empty bucket is never read.
      by_bucket_[bucket] =
          Limits{by_rank_[std::min(start, cols_ - 1)].alive, by_rank_[std::max<int64_t>(end, 1) - 1].dead};
      start = end;
    }
    return true;
  }

  void draw_sorted(const uint32_t* words, uint8_t* mask) {
    sorter_.rank(ranks_.data());
    for (int64_t i = 0; i < cols_; ++i) mask[i] = words[i] < thresholds_[ranks_[i]] ? 1 : 0;
  }

  const int64_t* thresholds_;
  int64_t cols_;
  RowSorter<Key> sorter_;
  std::vector<int32_t> ranks_;
  std::vector<uint32_t> words_;
  std::vector<int32_t> buckets_;  // of the elements
  std::vector<uint8_t> verdicts_;
  std::vector<uint32_t> counts_;  // of the buckets
  std::vector<Limits> by_rank_;
  std::vector<Limits> by_bucket_;
};

template <class Key>
void run(const MatrixView& x, const MatrixView* base, const int64_t* thresholds, int64_t cols, const RandomMask& drawn,
         const RankedMaskOutput& output, int threads) {
  const int64_t elements = element_count(x);
  const int64_t workers = row_workers(elements, cols, threads);
  std::vector<RowDrawer<Key>> drawers(workers, RowDrawer<Key>(thresholds, cols));
  std::atomic<int64_t> nonfinite{0};
  for_rows(workers, elements, cols, threads, [&](int64_t worker, int64_t row) {
    const int64_t bad = load_keys(x, base, row * cols, cols, drawers[worker].keys());
    if (bad > 0) {
      nonfinite += bad;
    } else {
      drawers[worker].draw(drawn, row * cols, output.mask + row * cols);
    }
  });
  *output.nonfinite = nonfinite;
}

}  // namespace

void ranked_mask_cpu(const MatrixView& x, const MatrixView* base, const int64_t* thresholds, int64_t cols,
                     const RandomMask& drawn, const RankedMaskOutput& output, int threads) {
  const bool wide = base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1);
  (wide ? run<uint64_t> : run<uint32_t>)(x, base, thresholds, cols, drawn, output, threads);
}

}  // namespace r_tsvm
