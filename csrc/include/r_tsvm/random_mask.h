// A random mask. The definition is r_tsvm_kernels/ops/random_mask/reference.py.
//
// Output: one byte per element, 0 or 1, owned by the caller, overwritten. Byte i depends on `mask` and i alone.
#pragma once

#include <cstdint>

#include "r_tsvm/philox.h"

namespace r_tsvm {

// Uses at most `threads` threads, one for small masks.
void random_mask_cpu(uint8_t* output, int64_t elements, const RandomMask& mask, int threads);

}  // namespace r_tsvm
