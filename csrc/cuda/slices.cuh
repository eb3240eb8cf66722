// Cuts tensors into slices. Thread t of a block has elements 4 t ... 4 t + 3 of each slice. They share one random
// counter and, if the address allows it, one read.
#pragma once

#include "dtype.cuh"
#include "launch.cuh"
#include "r_tsvm/philox.h"

namespace r_tsvm {

inline constexpr int kItems = 4;
inline constexpr int kSlice = kThreads * kItems;

inline int64_t slice_count(int64_t elements) { return (elements + kSlice - 1) / kSlice; }

// The flat index of the thread's first element; it may exceed 2^31.
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

// The thread's elements of one tensor, as they are stored. Reading and widening are separate, so that several reads can
// be in flight.
template <class Real>
struct Raw {
  uint32_t word[kItems * sizeof(Real) / sizeof(uint32_t)];
};

template <class Bits, class Real>
__device__ inline void load_bits(const void* data, int64_t index, int64_t elements, Raw<Real>& raw) {
  struct alignas(kItems * sizeof(Bits)) Words {
    uint32_t word[kItems * sizeof(Bits) / sizeof(uint32_t)];
  };
  constexpr int kWords = sizeof(Words) / sizeof(uint32_t);
  const Bits* from = static_cast<const Bits*>(data) + index;
  if (is_whole(from, index, elements)) {
    const Words words = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw.word[w] = words.word[w];
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint64_t bits = index + j < elements ? from[j] : Bits{0};
      const int at = j * static_cast<int>(sizeof(Bits));
      raw.word[at / 4] |= static_cast<uint32_t>(bits << 8 * (at % 4));
      if constexpr (sizeof(Bits) == 8) raw.word[at / 4 + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
}

// Elements index ... index + 3 of a contiguous view, and zeros beyond its end.
template <class Real>
__device__ inline Raw<Real> load_raw(const MatrixView& view, int64_t index, int64_t elements) {
  Raw<Real> raw{};
  switch (view.type) {
    case ElementType::kFloat64:
      // Only reached with Real = double, which any float64 input selects.
      if constexpr (sizeof(Real) == sizeof(double)) load_bits<uint64_t>(view.data, index, elements, raw);
      break;
    case ElementType::kFloat32:
      load_bits<uint32_t>(view.data, index, elements, raw);
      break;
    case ElementType::kFloat16:
    case ElementType::kBFloat16:
      load_bits<uint16_t>(view.data, index, elements, raw);
      break;
  }
  return raw;
}

template <class Real>
__device__ inline void widen(ElementType type, const Raw<Real>& raw, Real (&out)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const uint16_t half = static_cast<uint16_t>(raw.word[j / 2] >> 16 * (j % 2));
    switch (type) {
      case ElementType::kFloat64:
        if constexpr (sizeof(Real) == sizeof(double)) {
          const uint64_t bits = static_cast<uint64_t>(raw.word[2 * j + 1]) << 32 | raw.word[2 * j];
          out[j] = __longlong_as_double(static_cast<long long>(bits));
        }
        break;
      case ElementType::kFloat32:
        out[j] = __uint_as_float(raw.word[j]);
        break;
      case ElementType::kFloat16:
        out[j] = widened(reinterpret_cast<const __half&>(half));
        break;
      case ElementType::kBFloat16:
        out[j] = __uint_as_float(static_cast<uint32_t>(half) << 16);
        break;
    }
  }
}

template <class Real>
__device__ inline void load_four(const MatrixView& view, int64_t index, int64_t elements, Real (&out)[kItems]) {
  widen(view.type, load_raw<Real>(view, index, elements), out);
}

// Calls body(t, values) for each of `count` tensors that is `wanted`, in order, with values = view_of(t) - base; a base
// without data is 0. `origin` becomes the base if any tensor is wanted. The next tensor is read while the current one
// is processed.
template <class Real, class Wanted, class ViewOf, class Body>
__device__ inline void for_differences(const MatrixView& base, int count, const Wanted& wanted, const ViewOf& view_of,
                                       int64_t index, int64_t elements, Real (&origin)[kItems], const Body& body) {
  const auto next_wanted = [&](int t) {
    while (t < count && !wanted(t)) ++t;
    return t;
  };
  int t = next_wanted(0);
  if (t >= count) return;
  Raw<Real> first{};
  if (base.data != nullptr) first = load_raw<Real>(base, index, elements);
  Raw<Real> next = load_raw<Real>(view_of(t), index, elements);
  widen(base.type, first, origin);
  while (t < count) {
    const int current = t;
    const Raw<Real> raw = next;
    t = next_wanted(t + 1);
    if (t < count) next = load_raw<Real>(view_of(t), index, elements);
    Real values[kItems];
    widen(view_of(current).type, raw, values);
#pragma unroll
    for (int j = 0; j < kItems; ++j) values[j] -= origin[j];
    body(current, values);
  }
}

// Which tensors for_differences takes if all are wanted.
struct Every {
  __device__ bool operator()(int) const { return true; }
};

// One instruction for 16 bytes: nvcc splits an assignment into single elements where the kernel also stores those. The
// lines leave the cache first, because no kernel reads what it has stored.
__device__ inline void store_whole(const float (&in)[kItems], float* to) {
  __stcs(reinterpret_cast<float4*>(to), float4{in[0], in[1], in[2], in[3]});
}
__device__ inline void store_whole(const double (&in)[kItems], double* to) {
  __stcs(reinterpret_cast<double2*>(to), double2{in[0], in[1]});
  __stcs(reinterpret_cast<double2*>(to + 2), double2{in[2], in[3]});
}

__device__ inline void store_whole(const uint16_t (&in)[kItems], uint16_t* to) {
  const auto pair = [&](int j) { return static_cast<unsigned>(in[j]) | static_cast<unsigned>(in[j + 1]) << 16; };
  __stcs(reinterpret_cast<uint2*>(to), uint2{pair(0), pair(2)});
}

template <class T>
__device__ inline void store_four(const T (&in)[kItems], T* to, int64_t index, int64_t elements) {
  to += index;
  if (is_whole(to, index, elements)) {
    store_whole(in, to);
  } else {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (index + j < elements) to[j] = in[j];
    }
  }
}

template <ElementType kType, class Real>
__device__ inline void store_rounded(const Real (&in)[kItems], void* to, int64_t index, int64_t elements) {
  decltype(rounded<kType>(in[0])) narrow[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) narrow[j] = rounded<kType>(in[j]);
  store_four(narrow, static_cast<decltype(rounded<kType>(in[0]))*>(to), index, elements);
}

// Stores to a tensor of any float type.
template <class Real>
__device__ inline void store_as(ElementType type, const Real (&in)[kItems], void* to, int64_t index, int64_t elements) {
  switch (type) {
    case ElementType::kFloat64:
      store_rounded<ElementType::kFloat64>(in, to, index, elements);
      break;
    case ElementType::kFloat32:
      store_rounded<ElementType::kFloat32>(in, to, index, elements);
      break;
    case ElementType::kFloat16:
      store_rounded<ElementType::kFloat16>(in, to, index, elements);
      break;
    case ElementType::kBFloat16:
      store_rounded<ElementType::kBFloat16>(in, to, index, elements);
      break;
  }
}

// Clips at +-theta, which is on the device; all values become NaN if theta is NaN.
template <class Real>
__device__ inline void clip(const double* theta, Real (&values)[kItems]) {
  if (theta == nullptr) return;
  const Real bound = static_cast<Real>(*theta);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    values[j] = values[j] < -bound ? -bound : values[j];
    values[j] = values[j] > bound ? bound : values[j];
    values[j] = bound == bound ? values[j] : bound;
  }
}

// Replaces `base` by base + alpha * update. Where the step is 0, `base` stays as it is, because -0.0 + 0.0 is +0.0.
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
  const uint64_t counter = (mask.first + static_cast<uint64_t>(index)) / kItems;
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  words[2] = mask.substream;
  words[3] = 0;
  philox(philox_key(mask.seed), words[0], words[1], words[2], words[3]);
}

}  // namespace r_tsvm
