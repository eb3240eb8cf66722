// Ranks the magnitudes of a row by a radix sort of their bits, lowest digit first. The row is read from its end, so
// that of equal magnitudes the higher index comes first. The last pass writes ranks instead of sorted elements.
//
// Only the bits in which a row differs are sorted: differences of 16-bit weights have many zeros at their end, and few
// exponents.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "parallel.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Most bits of a digit, by the length of the row: more of them save passes, but need more counters.
inline int digit_bits(int64_t cols) { return cols < 512 ? 8 : cols < 2048 ? 10 : cols < 8192 ? 11 : 12; }
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

// What the keys of a row that are not 0 have in common.
template <class Key>
struct KeyRange {
  Key any;      // or of all keys
  Key least;    // of those that are not 0
  Key largest;  // of all
};
KeyRange<uint16_t> range_of(const uint16_t* keys, int64_t n);
KeyRange<uint32_t> range_of(const uint32_t* keys, int64_t n);
KeyRange<uint64_t> range_of(const uint64_t* keys, int64_t n);

// Replaces each key by max(key >> shift, offset) - offset.
void reduce_keys(uint16_t* keys, int64_t n, int shift, uint16_t offset);
void reduce_keys(uint32_t* keys, int64_t n, int shift, uint32_t offset);
void reduce_keys(uint64_t* keys, int64_t n, int shift, uint64_t offset);

inline int bit_width(uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

inline int64_t rows_per_unit(int64_t cols) { return std::max<int64_t>(1, kUnit / cols); }

template <class Key>
class RowSorter {
 public:
  explicit RowSorter(int64_t cols) : cols_(cols), digit_(digit_bits(cols)), keys_(cols) {}

  Key* keys() { return keys_.data(); }

  // Ranks the keys, and overwrites them.
  void rank(int32_t* ranks) {
    if (cols_ <= kShortRow) return rank_short(keys(), cols_, ranks);
    const KeyRange<Key> range = range_of(keys(), cols_);
    if (range.any == 0) {
      for (int64_t i = 0; i < cols_; ++i) ranks[i] = static_cast<int32_t>(cols_ - 1 - i);
      return;
    }
    // 0 stays 0, and the least of the others becomes 1.
    const int shift = __builtin_ctzll(range.any);
    const Key offset = static_cast<Key>((range.least >> shift) - 1);
    reduce_keys(keys(), cols_, shift, offset);
    const int width = bit_width(static_cast<uint64_t>((range.largest >> shift) - offset));
    if (width <= 16 && cols_ <= int64_t{1} << 16) {
      sort(narrow_, width, ranks);
    } else if (width <= 32) {
      sort(wide_, width, ranks);
    } else {
      sort(widest_, width, ranks);
    }
  }

 private:
  template <class Bits, class Index>
  struct Element {
    Bits key;
    Index index;
  };
  template <class Bits, class Index>
  struct Buffers {
    std::vector<Element<Bits, Index>> from, to;
  };

  // Calls sort with the number of passes, so that the loop over their counters is unrolled.
  template <class Bits, class Index>
  void sort(Buffers<Bits, Index>& buffers, int width, int32_t* ranks) {
    const int passes = (width + digit_ - 1) / digit_, bits = (width + passes - 1) / passes;
    counts_.assign(static_cast<size_t>(2 * passes) << bits, 0);
    if (passes == 1) return sort<1>(buffers, passes, bits, ranks);
    buffers.from.resize(cols_);
    buffers.to.resize(cols_);
    if (passes == 2) return sort<2>(buffers, passes, bits, ranks);
    if (passes == 3) return sort<3>(buffers, passes, bits, ranks);
    if (passes == 4) return sort<4>(buffers, passes, bits, ranks);
    sort<8>(buffers, passes, bits, ranks);
  }

  template <int kMost, class Bits, class Index>
  void sort(Buffers<Bits, Index>& buffers, int given, int bits, int32_t* __restrict ranks) {
    const int passes = kMost < 8 ? kMost : given;
    const int64_t n = cols_, values = int64_t{1} << bits;
    const uint32_t mask = static_cast<uint32_t>(values - 1);
    const Key* __restrict const keys = keys_.data();
    uint32_t* __restrict const counts = counts_.data();
    // Elements often have the same digit, and adding twice to one counter takes long. So each half of the row has its
    // own counters, and elements of both halves take turns.
    uint32_t* __restrict const others = counts + passes * values;  // of the second half
    const int64_t half = n / 2;
    const auto count = [&](int64_t i, uint32_t* own) {
      const Bits key = static_cast<Bits>(keys[i]);
      for (int pass = 0; pass < passes; ++pass) ++own[pass * values + (key >> (bits * pass) & mask)];
    };
    for (int64_t i = 0; i < half; ++i) {
      count(i, counts);
      count(half + i, others);
    }
    if (n % 2 == 1) count(n - 1, others);
    // Of equal digits the second half comes first.
    uint32_t place = 0;
    for (int64_t value = 0; value < values; ++value) {
      const uint32_t second = std::exchange(others[value], place);
      place += second + std::exchange(counts[value], place + second);
    }
    for (int64_t i = values; i < passes * values; ++i) counts[i] += others[i];
    for (int pass = 1; pass < passes; ++pass) starts(counts + pass * values, values);

    // Calls put with each element and its place by the lowest digit, from the end of each half.
    const auto place_first = [&](const auto& put) {
      for (int64_t i = half - 1, j = n - 1; i >= 0; --i, --j) {
        const Bits key = static_cast<Bits>(keys[i]), other = static_cast<Bits>(keys[j]);
        put(key, i, counts[key & mask]++);
        put(other, j, others[other & mask]++);
      }
      if (n % 2 == 1) {
        const Bits key = static_cast<Bits>(keys[half]);
        put(key, half, others[key & mask]++);
      }
    };
    if (passes == 1) {
      place_first([&](Bits, int64_t i, uint32_t rank) { ranks[i] = static_cast<int32_t>(rank); });
      return;
    }
    Element<Bits, Index>* __restrict from = buffers.from.data();
    Element<Bits, Index>* __restrict to = buffers.to.data();
    place_first([&](Bits key, int64_t i, uint32_t at) { to[at] = {key, static_cast<Index>(i)}; });
    for (int pass = 1; pass < passes; ++pass) {
      std::swap(from, to);
      uint32_t* __restrict const places = counts + pass * values;
      const int shift = bits * pass;
      if (pass == passes - 1) {
        for (int64_t i = 0; i < n; ++i) ranks[from[i].index] = static_cast<int32_t>(places[from[i].key >> shift]++);
      } else {
        for (int64_t i = 0; i < n; ++i) to[places[from[i].key >> shift & mask]++] = from[i];
      }
    }
  }

  // Turns counts into the positions at which the digits begin.
  static void starts(uint32_t* counts, int64_t values) {
    uint32_t place = 0;
    for (int64_t value = 0; value < values; ++value) place += std::exchange(counts[value], place);
  }

  int64_t cols_;
  int digit_;
  std::vector<Key> keys_;
  std::vector<uint32_t> counts_;
  Buffers<uint16_t, uint16_t> narrow_;
  Buffers<uint32_t, uint32_t> wide_;
  Buffers<uint64_t, uint32_t> widest_;
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
