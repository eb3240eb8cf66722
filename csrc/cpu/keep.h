// The loops of pruning that every instruction set gets its own version of.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace r_tsvm {

// Bit patterns of magnitudes: those above `most` survive, those below `least` do not, the others are undecided.
struct Bracket {
  int64_t least;
  int64_t most;
};

// The patterns that begin with `prefix` and have so many bits more, up to all 63.
inline Bracket bracket_of(int64_t prefix, int bits) {
  const int64_t least = prefix << bits;
  return Bracket{least, least | static_cast<int64_t>((uint64_t{1} << bits) - 1)};
}

// Of up to kBlock elements, each a byte; and the places of the marked ones. Both have a margin to write into.
inline constexpr int64_t kMarksAtOnce = sizeof(uint64_t);
struct alignas(64) Marks {
  uint8_t at[kBlock + kMarksAtOnce];
};
struct alignas(64) Positions {
  uint16_t at[kBlock + kMarksAtOnce];
};

struct Tally {
  int64_t above;
  int64_t largest;
};

// Writes the values whose magnitude has at least the bits `from`, +0.0 in place of the others. Returns the number of
// those above the bracket and the largest bits; marks those inside by 1, the rest by 0.
Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, float* kept, Marks& inside);
Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, double* kept, Marks& inside);

int64_t count_marked(const Marks& marks, int64_t n);

// Lists the positions of the marked ones among n elements, in order; returns their number.
int64_t list_marked(Marks& marks, int64_t n, Positions& positions);

// Lists the positions of the values inside the bracket, in order; returns their number.
int64_t list_inside(const float* values, int64_t n, const Bracket& bracket, Positions& positions);
int64_t list_inside(const double* values, int64_t n, const Bracket& bracket, Positions& positions);

}  // namespace r_tsvm
