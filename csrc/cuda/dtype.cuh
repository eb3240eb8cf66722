// Reading elements of any float type into registers.
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

// out[j] = element first + threadIdx.x + j * kThreads of a contiguous view, 0 from `count` elements after `first` on.
// Neighbouring threads read neighbouring elements; the loop is unrolled, so all reads are under way together.
template <class From, int kThreads, int kPerThread, class Real>
__device__ inline void load_as(const void* data, int64_t first, int count, Real (&out)[kPerThread]) {
  const From* from = static_cast<const From*>(data) + first;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int k = static_cast<int>(threadIdx.x) + j * kThreads;
    out[j] = k < count ? static_cast<Real>(widened(from[k])) : Real{0};
  }
}

template <int kThreads, int kPerThread, class Real>
__device__ inline void load(const MatrixView& view, int64_t first, int count, Real (&out)[kPerThread]) {
  switch (view.type) {
    case ElementType::kFloat64:
      // Only reached with Real = double: float64 among the inputs is what selects it.
      if constexpr (sizeof(Real) == sizeof(double)) load_as<double, kThreads>(view.data, first, count, out);
      break;
    case ElementType::kFloat32:
      load_as<float, kThreads>(view.data, first, count, out);
      break;
    case ElementType::kFloat16:
      load_as<__half, kThreads>(view.data, first, count, out);
      break;
    case ElementType::kBFloat16:
      load_as<__nv_bfloat16, kThreads>(view.data, first, count, out);
      break;
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
