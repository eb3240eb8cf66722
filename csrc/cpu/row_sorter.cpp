#include "row_sorter.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "selection.h"

namespace r_tsvm {
namespace {

template <class Key>
RTSVM_INLINE void rank_short_any(const Key* keys, int64_t n, int32_t* ranks) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t rank = 0;
    for (int64_t j = 0; j < i; ++j) rank += keys[j] < keys[i] ? 1 : 0;
    for (int64_t j = i + 1; j < n; ++j) rank += keys[j] <= keys[i] ? 1 : 0;
    ranks[i] = rank;
  }
}

template <class Key>
RTSVM_INLINE KeyRange<Key> range_of_any(const Key* keys, int64_t n) {
  Key any = 0, below = static_cast<Key>(~Key{0}), largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    any |= keys[i];
    below = std::min(below, static_cast<Key>(keys[i] - 1));  // of 0 it is the largest number
    largest = std::max(largest, keys[i]);
  }
  return {any, static_cast<Key>(below + 1), largest};
}

template <class Key>
RTSVM_INLINE void reduce_keys_any(Key* keys, int64_t n, int shift, Key offset) {
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = static_cast<Key>(std::max(static_cast<Key>(keys[i] >> shift), offset) - offset);
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

template <class Real, class Key>
int64_t load_keys_any(const MatrixView& x, const MatrixView* base, int64_t first, int64_t n, Key* keys) {
  int64_t bad = 0;
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t size = std::min(kBlock, n - done);
    alignas(64) Real values[kBlock];
    if (base == nullptr) {
      load(x, first + done, size, values);
    } else {
      load_difference(x, *base, first + done, size, static_cast<Real>(INFINITY), values);
    }
    alignas(64) Key words[kBlock];
    std::memcpy(words, values, size * sizeof(Real));
    bad += keys_of(words, size, static_cast<Key>(Pattern<Real>::kInfinity), keys + done);
  }
  return bad;
}

}  // namespace

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void rank_short(const uint16_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES void rank_short(const uint32_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES void rank_short(const uint64_t* keys, int64_t n, int32_t* ranks) { rank_short_any(keys, n, ranks); }
RTSVM_ISA_CLONES KeyRange<uint16_t> range_of(const uint16_t* keys, int64_t n) { return range_of_any(keys, n); }
RTSVM_ISA_CLONES KeyRange<uint32_t> range_of(const uint32_t* keys, int64_t n) { return range_of_any(keys, n); }
RTSVM_ISA_CLONES KeyRange<uint64_t> range_of(const uint64_t* keys, int64_t n) { return range_of_any(keys, n); }
RTSVM_ISA_CLONES void reduce_keys(uint16_t* keys, int64_t n, int shift, uint16_t offset) {
  reduce_keys_any(keys, n, shift, offset);
}
RTSVM_ISA_CLONES void reduce_keys(uint32_t* keys, int64_t n, int shift, uint32_t offset) {
  reduce_keys_any(keys, n, shift, offset);
}
RTSVM_ISA_CLONES void reduce_keys(uint64_t* keys, int64_t n, int shift, uint64_t offset) {
  reduce_keys_any(keys, n, shift, offset);
}
RTSVM_ISA_CLONES int64_t keys_of(const uint16_t* words, int64_t n, uint16_t infinity, uint16_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}
RTSVM_ISA_CLONES int64_t keys_of(const uint32_t* words, int64_t n, uint32_t infinity, uint32_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}
RTSVM_ISA_CLONES int64_t keys_of(const uint64_t* words, int64_t n, uint64_t infinity, uint64_t* keys) {
  return keys_of_any(words, n, infinity, keys);
}

int64_t load_keys(const MatrixView& x, const MatrixView* base, int64_t first, int64_t n, uint32_t* keys) {
  return load_keys_any<float>(x, base, first, n, keys);
}
int64_t load_keys(const MatrixView& x, const MatrixView* base, int64_t first, int64_t n, uint64_t* keys) {
  return load_keys_any<double>(x, base, first, n, keys);
}

}  // namespace r_tsvm
