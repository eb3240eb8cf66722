#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31;
  const int fraction = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return std::copysign(magnitude, (value.bits & 0x8000) != 0 ? -1.0f : 1.0f);
}

// To nearest, ties to even.
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude == 0) return {sign};
  int exponent;
  std::frexp(magnitude, &exponent);
  const int least = std::max(exponent - 11, -24);  // the exponent of the last place
  const auto places = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, -least)));
  // 1024 places and more are a normal number: its leading place adds one to the exponent, and so does a carry.
  return {static_cast<uint16_t>(sign | ((least + 24) << 10) + places)};
}

inline uint16_t __half_as_ushort(__half value) { return value.bits; }
