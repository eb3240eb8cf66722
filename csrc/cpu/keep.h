// The loops of pruning that every instruction set gets its own version of.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Bit patterns of magnitudes: those above `most` survive, those below `least` do not, the others are undecided.
struct Bracket {
  int64_t least;
  int64_t most;
};

struct Tally {
  int64_t above;
  int64_t inside;
  int64_t tied;
  int64_t nonfinite;
};

// Writes the values whose magnitude has at least the bits `from`, +0.0 in place of the others. Counts those above the
// bracket, inside it, equal to `tie`, and those that are NaN or infinite.
Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie, float* kept);
Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, int64_t tie, double* kept);

// Lists the positions of the values inside the bracket, in order; returns their number. n <= kBlock; `positions` has
// room for n + 1.
int64_t list_inside(const float* values, int64_t n, const Bracket& bracket, uint16_t* positions);
int64_t list_inside(const double* values, int64_t n, const Bracket& bracket, uint16_t* positions);

}  // namespace r_tsvm
