// Ranks the magnitudes of a row by a radix sort of their bits, lowest digit first. The row is read from its end, so
// that of equal magnitudes the higher index comes first. The last pass writes ranks instead of sorted elements.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "parallel.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Bits of a digit. The wide one saves a pass over the row, but needs more counters. 16-bit floats have two digits with
// either.
inline constexpr int kDigit = 8;
inline constexpr int kWideDigit = 11;
inline constexpr int64_t kLongRow = 2048;
// Rows up to this length are ranked by comparing all pairs of elements.
inline constexpr int64_t kShortRow = 48;
// Threads take short rows in units of about this many elements.
inline constexpr int64_t kUnit = 1 << 14;

// Writes the bits of n <= kBlock magnitudes. Returns how many are not finite: keys from `infinity` upwards.
int64_t keys_of(const uint16_t* words, int64_t n, uint16_t infinity, uint16_t* keys);
int64_t keys_of(const uint32_t* words, int64_t n, uint32_t infinity, uint32_t* keys);
int64_t keys_of(const uint64_t* words, int64_t n, uint64_t infinity, uint64_t* keys);

// Writes the bits of the magnitudes of elements first ... first + n - 1 of x, or of x - base if there is a base, as
// float or double. Returns how many are not finite.
int64_t load_keys(const MatrixView& x, const MatrixView* base, int64_t first, int64_t n, uint32_t* keys);
int64_t load_keys(const MatrixView& x, const MatrixView* base, int64_t first, int64_t n, uint64_t* keys);

// The ranks of a short row.
void rank_short(const uint16_t* keys, int64_t n, int32_t* ranks);
void rank_short(const uint32_t* keys, int64_t n, int32_t* ranks);
void rank_short(const uint64_t* keys, int64_t n, int32_t* ranks);

inline int64_t rows_per_unit(int64_t cols) { return std::max<int64_t>(1, kUnit / cols); }

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

  // Turns counts into the positions at which the digits begin.
  static void starts(uint32_t* counts) {
    uint32_t place = 0;
    for (int value = 0; value < kValues; ++value) place += std::exchange(counts[value], place);
  }

  int64_t cols_;
  std::vector<Key> keys_;
  std::vector<Element> from_;
  std::vector<Element> to_;
};

// Workers share the rows.
inline int64_t row_workers(int64_t elements, int64_t cols, int threads) {
  const int64_t units = (elements / cols + rows_per_unit(cols) - 1) / rows_per_unit(cols);
  return elements < kParallelElements ? 1 : std::min<int64_t>(units, threads);
}

// Calls body(worker, row) for every row.
template <class Body>
void for_rows(int64_t workers, int64_t elements, int64_t cols, int threads, const Body& body) {
  const int64_t rows = elements / cols;
  std::atomic<int64_t> next{0};
  parallel_for(workers, elements, threads, [&](int64_t worker) {
    for (int64_t first = next.fetch_add(rows_per_unit(cols)); first < rows;
         first = next.fetch_add(rows_per_unit(cols))) {
      const int64_t end = std::min(rows, first + rows_per_unit(cols));
      for (int64_t row = first; row < end; ++row) body(worker, row);
    }
  });
}

}  // namespace r_tsvm
