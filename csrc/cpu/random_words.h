#pragma once

#include <cstdint>

#include "r_tsvm/philox.h"

namespace r_tsvm {

// random_words writes whole groups of this many.
inline constexpr int64_t kWordGroup = 128;

// Writes the words of elements first ... first + n - 1 (r_tsvm/philox.h). `first` is a multiple of 4. The output has
// room for n, rounded up to a multiple of kWordGroup.
void random_words(const RandomMask& mask, int64_t first, int64_t n, uint32_t* words);

}  // namespace r_tsvm
