// Elements of any float type: read into registers, and rounded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

__device__ inline double widened(double value) { return value; }
__device__ inline float widened(float value) { return value; }
__device__ inline float widened(__half value) { return __half2float(value); }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounded to nearest, ties to even, as PyTorch does: from float64 to 16 bits by way of float32. The results are the
// bits of what is stored.
template <ElementType kType, class Real>
__device__ inline auto rounded(Real value) {
  if constexpr (kType == ElementType::kFloat64) {
    return static_cast<double>(value);
  } else if constexpr (kType == ElementType::kFloat32) {
    return static_cast<float>(value);
  } else if constexpr (kType == ElementType::kFloat16) {
    return __half_as_ushort(__float2half_rn(static_cast<float>(value)));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)));
  }
}

// Element i of a contiguous view.
template <class Real>
__device__ inline Real element(const MatrixView& view, int64_t i) {
  switch (view.type) {
    case ElementType::kFloat64:
      return static_cast<Real>(static_cast<const double*>(view.data)[i]);
    case ElementType::kFloat32:
      return static_cast<Real>(static_cast<const float*>(view.data)[i]);
    case ElementType::kFloat16:
      return static_cast<Real>(widened(static_cast<const __half*>(view.data)[i]));
    case ElementType::kBFloat16:
      return static_cast<Real>(widened(static_cast<const __nv_bfloat16*>(view.data)[i]));
  }
  return 0;
}

}  // namespace r_tsvm
