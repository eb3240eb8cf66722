#include "keep.h"

#include <cstring>

#include "isa.h"
#include "selection.h"

namespace r_tsvm {
namespace {

// Elements looked at together, most of the time to find nothing.
constexpr int64_t kGroup = sizeof(uint64_t);

template <class Real>
RTSVM_INLINE Tally keep_from_any(const Real* __restrict values, int64_t n, int64_t from, const Bracket& bracket,
                                 int64_t tie, Real* __restrict kept) {
  using Int = typename Pattern<Real>::Int;
  const Int first_kept = static_cast<Int>(from);
  const Int least = static_cast<Int>(bracket.least);
  const Int most = static_cast<Int>(bracket.most);
  const Int exact = static_cast<Int>(tie);
  Int above = 0, reached = 0, tied = 0, nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Int bits = magnitude_bits(values[i]);
    kept[i] = bits >= first_kept ? values[i] : Real{0};
    above += bits > most ? 1 : 0;
    reached += bits >= least ? 1 : 0;
    tied += bits == exact ? 1 : 0;
    nonfinite += bits >= static_cast<Int>(Pattern<Real>::kInfinity) ? 1 : 0;
  }
  return Tally{above, reached - above, tied, nonfinite};
}

template <class Real>
RTSVM_INLINE int64_t list_inside_any(const Real* values, int64_t n, const Bracket& bracket, uint16_t* positions) {
  using Int = typename Pattern<Real>::Int;
  const Int least = static_cast<Int>(bracket.least);
  const Int most = static_cast<Int>(bracket.most);
  alignas(64) uint8_t inside[kBlock + kGroup];
  for (int64_t i = 0; i < n; ++i) {
    const Int bits = magnitude_bits(values[i]);
    inside[i] = (bits >= least) & (bits <= most) ? 1 : 0;
  }
  for (int64_t i = n; i < n + kGroup; ++i) inside[i] = 0;
  int64_t found = 0;
  for (int64_t first = 0; first < n; first += kGroup) {
    uint64_t any;
    std::memcpy(&any, inside + first, sizeof(any));
    if (any == 0) continue;
    for (int64_t i = first; i < first + kGroup; ++i) {
      positions[found] = static_cast<uint16_t>(i);
      found += inside[i];
    }
  }
  return found;
}

}  // namespace

// GCC clones functions, not templates.
RTSVM_ISA_CLONES Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie,
                                 float* kept) {
  return keep_from_any(values, n, from, bracket, tie, kept);
}
RTSVM_ISA_CLONES Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie,
                                 double* kept) {
  return keep_from_any(values, n, from, bracket, tie, kept);
}
RTSVM_ISA_CLONES int64_t list_inside(const float* values, int64_t n, const Bracket& bracket, uint16_t* positions) {
  return list_inside_any(values, n, bracket, positions);
}
RTSVM_ISA_CLONES int64_t list_inside(const double* values, int64_t n, const Bracket& bracket, uint16_t* positions) {
  return list_inside_any(values, n, bracket, positions);
}

}  // namespace r_tsvm
