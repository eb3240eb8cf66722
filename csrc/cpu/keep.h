// The loops of pruning, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace r_tsvm {

// Bit patterns of magnitudes. Those above `most` survive and those below `least` do not; the others are undecided.
struct Bracket {
  int64_t least;
  int64_t most;
};

// The patterns that begin with `prefix`, followed by up to 63 more bits.
inline Bracket bracket_of(int64_t prefix, int bits) {
  const int64_t least = prefix << bits;
  return Bracket{least, least | static_cast<int64_t>((uint64_t{1} << bits) - 1)};
}

// Marks of up to kBlock elements, one byte each, and the positions of the marked ones. Both have a margin for writes
// past the end.
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

// Writes the values whose magnitude has at least the bits `from`, and +0.0 in place of the others. Marks those inside
// the bracket by 1 and the rest by 0. Returns the number above the bracket and the largest bits.
Tally keep_from(const float* values, int64_t n, int64_t from, const Bracket& bracket, float* kept, Marks& inside);
Tally keep_from(const double* values, int64_t n, int64_t from, const Bracket& bracket, double* kept, Marks& inside);

int64_t count_marked(const Marks& marks, int64_t n);

// Lists the positions of the marked elements among n, in order, and returns their number.
int64_t list_marked(Marks& marks, int64_t n, Positions& positions);

// Lists the positions of the values inside the bracket, in order, and returns their number.
int64_t list_inside(const float* values, int64_t n, const Bracket& bracket, Positions& positions);
int64_t list_inside(const double* values, int64_t n, const Bracket& bracket, Positions& positions);

}  // namespace r_tsvm
