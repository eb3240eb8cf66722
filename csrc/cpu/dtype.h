// Exact widening of 16-bit floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace r_tsvm {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

RTSVM_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

RTSVM_INLINE double widened(double value) { return value; }

RTSVM_INLINE float widened(float value) { return value; }

RTSVM_INLINE float widened(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// After F. Giesen, https://gist.github.com/rygorous/2156668. A float16 subnormal is built as a normal float32 with
// one bit too many, which a subtraction removes: no float32 subnormal occurs, so flush-to-zero modes change nothing.
RTSVM_INLINE float widened(Float16 value) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & kExponent;
  const uint32_t normal = magnitude + kRebias + (exponent == kExponent ? kRebias : 0u);
  const float subnormal = float_from_bits(magnitude + kRebias + (1u << 23)) - float_from_bits(kRebias + (1u << 23));
  uint32_t subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof(subnormal_bits));
  return float_from_bits(sign | (exponent == 0 ? subnormal_bits : normal));
}

}  // namespace r_tsvm
