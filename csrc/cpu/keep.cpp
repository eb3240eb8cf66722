#include "keep.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "selection.h"

namespace r_tsvm {
namespace {

template <class Real>
RTSVM_INLINE Tally keep_from_any(const Real* __restrict values, int64_t n, int64_t from, const Bracket& bracket,
                                 int64_t tie, Real* __restrict kept, uint8_t* __restrict inside) {
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
    inside[i] = (bits >= least) & (bits <= most) ? 1 : 0;
    tied += bits == exact ? 1 : 0;
    nonfinite += bits >= static_cast<Int>(Pattern<Real>::kInfinity) ? 1 : 0;
  }
  return Tally{above, reached - above, tied, nonfinite};
}

template <class Real>
RTSVM_INLINE void mark_inside_any(const Real* __restrict values, int64_t n, const Bracket& bracket,
                                  uint8_t* __restrict inside) {
  using Int = typename Pattern<Real>::Int;
  const Int least = static_cast<Int>(bracket.least);
  const Int most = static_cast<Int>(bracket.most);
  for (int64_t i = 0; i < n; ++i) {
    const Int bits = magnitude_bits(values[i]);
    inside[i] = (bits >= least) & (bits <= most) ? 1 : 0;
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void mark_inside(const float* values, int64_t n, const Bracket& bracket, uint8_t* inside) {
  mark_inside_any(values, n, bracket, inside);
}
RTSVM_ISA_CLONES void mark_inside(const double* values, int64_t n, const Bracket& bracket, uint8_t* inside) {
  mark_inside_any(values, n, bracket, inside);
}

template <class Real>
int64_t list_inside_any(const Real* values, int64_t n, const Bracket& bracket, Positions& positions) {
  Marks inside;
  mark_inside(values, n, bracket, inside.at);
  return list_marked(inside, n, positions);
}

}  // namespace

RTSVM_ISA_CLONES Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie,
                                 float* kept, Marks& inside) {
  return keep_from_any(values, n, from, bracket, tie, kept, inside.at);
}
RTSVM_ISA_CLONES Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie,
                                 double* kept, Marks& inside) {
  return keep_from_any(values, n, from, bracket, tie, kept, inside.at);
}

// No branch depends on where the marks are: few are set, and which ones cannot be foretold.
int64_t list_marked(Marks& marks, int64_t n, Positions& positions) {
  uint16_t groups[kBlock / kMarksAtOnce + 1];
  int64_t group_count = 0;
  std::fill_n(marks.at + n, kMarksAtOnce, uint8_t{0});
  for (int64_t first = 0; first < n; first += kMarksAtOnce) {
    uint64_t any;
    std::memcpy(&any, marks.at + first, sizeof(any));
    groups[group_count] = static_cast<uint16_t>(first);
    group_count += any != 0;
  }
  int64_t found = 0;
  for (int64_t group = 0; group < group_count; ++group) {
    for (int64_t i = groups[group]; i < groups[group] + kMarksAtOnce; ++i) {
      positions.at[found] = static_cast<uint16_t>(i);
      found += marks.at[i];
    }
  }
  return found;
}

int64_t list_inside(const float* values, int64_t n, const Bracket& bracket, Positions& positions) {
  return list_inside_any(values, n, bracket, positions);
}
int64_t list_inside(const double* values, int64_t n, const Bracket& bracket, Positions& positions) {
  return list_inside_any(values, n, bracket, positions);
}

}  // namespace r_tsvm
