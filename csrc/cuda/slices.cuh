// Tensors in slices: thread t of a block has the neighbours 4 t ... 4 t + 3 of each slice, which are one random counter
// and, where the address allows it, one read.
#pragma once

#include "dtype.cuh"
#include "launch.cuh"
#include "r_tsvm/philox.h"

namespace r_tsvm {

inline constexpr int kItems = 4;
inline constexpr int kSlice = kThreads * kItems;

inline int64_t slice_count(int64_t elements) { return (elements + kSlice - 1) / kSlice; }

// The flat index of the thread's first element. Tensors exceed 2^31 elements.
__device__ inline int64_t first_item(int64_t slice) {
  return slice * kSlice + static_cast<int64_t>(threadIdx.x) * kItems;
}

template <class T>
struct alignas(kItems * sizeof(T)) Four {
  T item[kItems];
};

template <class T>
__device__ inline bool is_whole(const T* address, int64_t index, int64_t elements) {
  return index + kItems <= elements && reinterpret_cast<uintptr_t>(address) % alignof(Four<T>) == 0;
}

template <class From, class Real>
__device__ inline void load_four_as(const void* data, int64_t index, int64_t elements, Real (&out)[kItems]) {
  const From* from = static_cast<const From*>(data) + index;
  if (is_whole(from, index, elements)) {
    const Four<From> four = *reinterpret_cast<const Four<From>*>(from);
#pragma unroll
    for (int j = 0; j < kItems; ++j) out[j] = static_cast<Real>(widened(four.item[j]));
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) out[j] = index + j < elements ? static_cast<Real>(widened(from[j])) : Real{0};
  }
}

// out[j] = element index + j of a contiguous view, 0 beyond its end.
template <class Real>
__device__ inline void load_four(const MatrixView& view, int64_t index, int64_t elements, Real (&out)[kItems]) {
  switch (view.type) {
    case ElementType::kFloat64:
      // Only reached with Real = double: float64 among the inputs is what selects it.
      if constexpr (sizeof(Real) == sizeof(double)) load_four_as<double>(view.data, index, elements, out);
      break;
    case ElementType::kFloat32:
      load_four_as<float>(view.data, index, elements, out);
      break;
    case ElementType::kFloat16:
      load_four_as<__half>(view.data, index, elements, out);
      break;
    case ElementType::kBFloat16:
      load_four_as<__nv_bfloat16>(view.data, index, elements, out);
      break;
  }
}

template <class Real>
__device__ inline void store_four(const Real (&in)[kItems], Real* to, int64_t index, int64_t elements) {
  to += index;
  if (is_whole(to, index, elements)) {
    Four<Real> four;
#pragma unroll
    for (int j = 0; j < kItems; ++j) four.item[j] = in[j];
    *reinterpret_cast<Four<Real>*>(to) = four;
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (index + j < elements) to[j] = in[j];
    }
  }
}

// `values` minus the same elements of `base`, which may be missing, clipped at +-theta; NaN if theta is NaN.
template <class Real>
__device__ inline void subtract_and_clip(const Real (&base)[kItems], const double* theta, Real (&values)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) values[j] -= base[j];
  if (theta == nullptr) return;
  const Real bound = static_cast<Real>(*theta);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    values[j] = values[j] < -bound ? -bound : values[j];
    values[j] = values[j] > bound ? bound : values[j];
    values[j] = bound == bound ? values[j] : bound;
  }
}

// base + alpha * update, in place of `base`, which stays as it is where the step is 0: -0.0 + 0.0 would be +0.0.
template <class Real>
__device__ inline void add_step(Real (&base)[kItems], Real alpha, const Real (&update)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const Real step = alpha * update[j];
    base[j] = step == 0 ? base[j] : base[j] + step;
  }
}

// The random words of the thread's elements (r_tsvm/philox.h).
__device__ inline void random_words(const RandomMask& mask, int64_t index, uint32_t (&words)[kItems]) {
  static_assert(kItems == 4, "the words of one counter");
  const uint64_t counter = static_cast<uint64_t>(index) / kItems;
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  words[2] = mask.stream;
  words[3] = 0;
  philox(philox_key(mask.seed), words[0], words[1], words[2], words[3]);
}

}  // namespace r_tsvm
