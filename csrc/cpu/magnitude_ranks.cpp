// Radix sort of each row by the bits of the magnitudes, lowest digit first. The row is entered from its end, so that of
// equal magnitudes the higher index comes first; the last pass writes ranks in place of sorted elements.
#include "r_tsvm/magnitude_ranks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "blocks.h"
#include "isa.h"
#include "parallel.h"
#include "selection.h"

namespace r_tsvm {
namespace {

// Bits of a digit; the wide one, which leaves out a pass over the row, costs more counters. 16-bit floats have two
// digits in any case.
constexpr int kDigit = 8;
constexpr int kWideDigit = 11;
constexpr int64_t kLongRow = 2048;
// Rows up to this length are ranked by comparing all pairs.
constexpr int64_t kShortRow = 48;
// Short rows are shared out in units of about so many elements.
constexpr int64_t kUnit = 1 << 14;

template <class Key>
RTSVM_INLINE void rank_short_any(const Key* keys, int64_t n, int32_t* ranks) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t rank = 0;
    for (int64_t j = 0; j < i; ++j) rank += keys[j] < keys[i] ? 1 : 0;
    for (int64_t j = i + 1; j < n; ++j) rank += keys[j] <= keys[i] ? 1 : 0;
    ranks[i] = rank;
  }
}

template <class Int, class Key>
RTSVM_INLINE int64_t keys_of_any(const Int* __restrict words, int64_t n, Key infinity, Key* __restrict keys) {
  constexpr Key kMagnitude = static_cast<Key>(~Key{0}) >> 1;
  Key nonfinite = 0;  // n <= kBlock fits into any key
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = static_cast<Key>(words[i]) & kMagnitude;
    nonfinite += keys[i] >= infinity ? 1 : 0;
  }
  return nonfinite;
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void rank_short(const uint16_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES void rank_short(const uint32_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES void rank_short(const uint64_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES int64_t keys_of(const uint16_t* words, int64_t n, uint16_t infinity, uint16_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}
RTSVM_ISA_CLONES int64_t keys_of(const uint32_t* words, int64_t n, uint32_t infinity, uint32_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}
RTSVM_ISA_CLONES int64_t keys_of(const uint64_t* words, int64_t n, uint64_t infinity, uint64_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}

template <class Key, class Index, int kBits>
class RowSorter {
 public:
  explicit RowSorter(int64_t cols) : cols_(cols), keys_(cols), from_(cols > kShortRow ? cols : 0), to_(from_.size()) {}

  Key* keys() { return keys_.data(); }

  void rank(int32_t* ranks) {
    if (cols_ <= kShortRow) {
      rank_short(keys(), cols_, ranks);
    } else {
      sort(keys(), ranks);
    }
  }

 private:
  static constexpr int kValues = 1 << kBits;
  static constexpr int kCount = (8 * sizeof(Key) - 1 + kBits - 1) / kBits;  // the sign is gone

  struct Element {
    Key key;
    Index index;
  };

  void sort(const Key* keys, int32_t* ranks) {
    uint32_t counts[kCount][kValues] = {};
    for (int64_t i = 0; i < cols_; ++i) {
      for (int digit = 0; digit < kCount; ++digit) ++counts[digit][value(keys[i], digit)];
    }
    int passes[kCount];
    int count = 0;
    for (int digit = 0; digit < kCount; ++digit) {  // a digit that all share sorts nothing
      if (counts[digit][value(keys[0], digit)] != static_cast<uint64_t>(cols_)) passes[count++] = digit;
    }
    if (count == 0) {
      for (int64_t i = 0; i < cols_; ++i) ranks[i] = static_cast<int32_t>(cols_ - 1 - i);
      return;
    }
    for (int pass = 0; pass < count; ++pass) starts(counts[passes[pass]]);
    const auto begin = [&](int digit, const auto& put) {
      for (int64_t i = cols_ - 1; i >= 0; --i) {
        put(counts[digit][value(keys[i], digit)]++, Element{keys[i], static_cast<Index>(i)});
      }
    };
    const auto go_on = [&](int digit, const auto& put) {
      for (const Element& element : from_) put(counts[digit][value(element.key, digit)]++, element);
    };
    const auto store = [&](uint32_t place, const Element& element) { to_[place] = element; };
    const auto finish = [&](uint32_t place, const Element& element) {
      ranks[element.index] = static_cast<int32_t>(place);
    };
    if (count == 1) return begin(passes[0], finish);
    begin(passes[0], store);
    for (int pass = 1; pass < count; ++pass) {
      std::swap(from_, to_);
      if (pass == count - 1) return go_on(passes[pass], finish);
      go_on(passes[pass], store);
    }
  }

  static int value(Key key, int digit) { return static_cast<int>((key >> (kBits * digit)) & (kValues - 1)); }

  // Turns counts into the places where the digits begin.
  static void starts(uint32_t* counts) {
    uint32_t place = 0;
    for (int value = 0; value < kValues; ++value) place += std::exchange(counts[value], place);
  }

  int64_t cols_;
  std::vector<Key> keys_;
  std::vector<Element> from_;
  std::vector<Element> to_;
};

// keys_of_row(first, n, keys) writes the keys of elements first ... first + n - 1 and returns how many are not finite.
template <class Key, class Index, int kBits, class KeysOfRow>
void run(int64_t elements, int64_t cols, const MagnitudeRanksOutput& output, int threads,
         const KeysOfRow& keys_of_row) {
  const int64_t rows = elements / cols;
  const int64_t rows_per_unit = std::max<int64_t>(1, kUnit / cols);
  const int64_t units = (rows + rows_per_unit - 1) / rows_per_unit;
  const int64_t workers = elements < kParallelElements ? 1 : std::min<int64_t>(units, threads);
  std::vector<RowSorter<Key, Index, kBits>> sorters(workers, RowSorter<Key, Index, kBits>(cols));
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> nonfinite{0};
  parallel_for(workers, elements, threads, [&](int64_t worker) {
    RowSorter<Key, Index, kBits>& sorter = sorters[worker];
    for (int64_t unit = next++; unit < units; unit = next++) {
      const int64_t end = std::min(rows, (unit + 1) * rows_per_unit);
      for (int64_t row = unit * rows_per_unit; row < end; ++row) {
        int64_t bad = 0;
        for (int64_t done = 0; done < cols; done += kBlock) {
          bad += keys_of_row(row * cols + done, std::min(kBlock, cols - done), sorter.keys() + done);
        }
        if (bad > 0) nonfinite += bad;
        sorter.rank(output.ranks + row * cols);
      }
    }
  });
  *output.nonfinite = nonfinite;
}

void run_16bit(const MatrixView& x, int64_t cols, uint16_t infinity, const MagnitudeRanksOutput& output, int threads) {
  const auto keys_of_row = [&](int64_t first, int64_t n, uint16_t* keys) {
    int64_t bad = 0;
    for_runs(x, first, n, [&](int64_t offset, int64_t run) {
      bad += keys_of(static_cast<const uint16_t*>(x.data) + offset, run, infinity, keys);
      keys += run;
    });
    return bad;
  };
  // Key and index in 4 bytes where they fit.
  if (cols <= int64_t{1} << 16) {
    run<uint16_t, uint16_t, kDigit>(element_count(x), cols, output, threads, keys_of_row);
  } else {
    run<uint16_t, uint32_t, kDigit>(element_count(x), cols, output, threads, keys_of_row);
  }
}

template <class Real, class Key>
void run_widened(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                 int threads) {
  const auto keys_of_row = [&](int64_t first, int64_t n, Key* keys) {
    alignas(64) Real values[kBlock];
    load(x, first, n, values);
    if (base != nullptr) {
      alignas(64) Real origin[kBlock];
      load(*base, first, n, origin);
      clipped_difference(origin, values, n, static_cast<Real>(INFINITY));
    }
    alignas(64) Key words[kBlock];
    std::memcpy(words, values, n * sizeof(Real));
    return keys_of(words, n, static_cast<Key>(Pattern<Real>::kInfinity), keys);
  };
  if (cols < kLongRow) {
    run<Key, uint32_t, kDigit>(element_count(x), cols, output, threads, keys_of_row);
  } else {
    run<Key, uint32_t, kWideDigit>(element_count(x), cols, output, threads, keys_of_row);
  }
}

}  // namespace

void magnitude_ranks_cpu(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                         int threads) {
  if (base == nullptr && x.type == ElementType::kBFloat16) {
    run_16bit(x, cols, 0x7f80, output, threads);
  } else if (base == nullptr && x.type == ElementType::kFloat16) {
    run_16bit(x, cols, 0x7c00, output, threads);
  } else if (base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1)) {
    run_widened<double, uint64_t>(x, base, cols, output, threads);
  } else {
    run_widened<float, uint32_t>(x, base, cols, output, threads);
  }
}

}  // namespace r_tsvm
