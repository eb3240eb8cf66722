#include "keep.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "selection.h"

namespace r_tsvm {
namespace {

// Whether least <= bits <= most, by one comparison.
template <class Real>
struct Inside {
  using Unsigned = std::make_unsigned_t<typename Pattern<Real>::Int>;

  explicit Inside(const Bracket& bracket)
      : least(static_cast<Unsigned>(bracket.least)), span(static_cast<Unsigned>(bracket.most - bracket.least)) {}
  bool operator()(typename Pattern<Real>::Int bits) const { return static_cast<Unsigned>(bits) - least <= span; }

  const Unsigned least;
  const Unsigned span;
};

template <class Real>
RTSVM_INLINE Tally keep_from_any(const Real* __restrict values, int64_t n, int64_t from, const Bracket& bracket,
                                 Real* __restrict kept, uint8_t* __restrict marks) {
  using Int = typename Pattern<Real>::Int;
  const Int first_kept = static_cast<Int>(from);
  const Int most = static_cast<Int>(bracket.most);
  const Inside<Real> inside(bracket);
  Int above = 0, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Int bits = magnitude_bits(values[i]);
    kept[i] = bits >= first_kept ? values[i] : Real{0};
    above += bits > most ? 1 : 0;
    largest = bits > largest ? bits : largest;
    marks[i] = inside(bits) ? 1 : 0;
  }
  return Tally{above, largest};
}

template <class Real>
RTSVM_INLINE void mark_inside_any(const Real* __restrict values, int64_t n, const Bracket& bracket,
                                  uint8_t* __restrict marks) {
  const Inside<Real> inside(bracket);
  for (int64_t i = 0; i < n; ++i) marks[i] = inside(magnitude_bits(values[i])) ? 1 : 0;
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

RTSVM_ISA_CLONES Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, float* kept,
                                 Marks& inside) {
  return keep_from_any(values, n, from, bracket, kept, inside.at);
}
RTSVM_ISA_CLONES Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, double* kept,
                                 Marks& inside) {
  return keep_from_any(values, n, from, bracket, kept, inside.at);
}

RTSVM_ISA_CLONES int64_t count_marked(const Marks& marks, int64_t n) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += marks.at[i];
  return count;
}

// No branch depends on the marks: few are set, at unpredictable places.
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
