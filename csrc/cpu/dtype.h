// Exact widening to float32 from 16 bits, and rounding to them: to nearest, ties to even, as in PyTorch.
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

RTSVM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

RTSVM_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// After F. Giesen, as above. The sum with 0.5 rounds a result that is subnormal in float16 to its last place.
RTSVM_INLINE Float16 to_float16(float value) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr uint32_t kTooLarge = (127u + 16u) << 23;
  constexpr uint32_t kLeastNormal = (127u - 14u) << 23;
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < kLeastNormal ? subnormal : normal;
  return Float16{static_cast<uint16_t>(sign | (magnitude >= kTooLarge ? large : finite))};
}

}  // namespace r_tsvm
