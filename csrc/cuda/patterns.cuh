// The bit pattern of a magnitude: of the float without its sign. As an integer it is ordered like the magnitude.
#pragma once

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

__device__ inline uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }
__device__ inline uint64_t magnitude_bits(double value) {
  return static_cast<uint64_t>(__double_as_longlong(value)) & 0x7fffffffffffffffu;
}

// NaN and infinity have this pattern or a larger one.
__device__ inline uint64_t infinity_bits(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
      return uint64_t{0x7ff} << 52;
    case ElementType::kFloat32:
      return 0x7f800000u;
    case ElementType::kFloat16:
      return 0x7c00u;
    case ElementType::kBFloat16:
      return 0x7f80u;
  }
  return 0;
}

}  // namespace r_tsvm
