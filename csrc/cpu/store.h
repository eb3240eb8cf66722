// The last steps of a merge: the base plus the update, rounded once to the dtype of the output.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// Where the step is 0, the bits of the base stay, including -0.0.
template <class Real>
RTSVM_INLINE void add_update(const Real* __restrict base, const Real* __restrict update, int64_t n, Real alpha,
                             Real* __restrict output) {
  for (int64_t i = 0; i < n; ++i) {
    const Real step = alpha * update[i];
    output[i] = step == 0 ? base[i] : base[i] + step;
  }
}

template <class Real>
RTSVM_INLINE void store(const Real* values, int64_t n, ElementType type, void* output, int64_t first) {
  switch (type) {
    case ElementType::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(output)[first + i] = values[i];
      break;
    case ElementType::kFloat32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(output)[first + i] = static_cast<float>(values[i]);
      break;
    case ElementType::kFloat16:
      for (int64_t i = 0; i < n; ++i) {
        static_cast<Float16*>(output)[first + i] = to_float16(static_cast<float>(values[i]));
      }
      break;
    case ElementType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) {
        static_cast<BFloat16*>(output)[first + i] = to_bfloat16(static_cast<float>(values[i]));
      }
      break;
  }
}

}  // namespace r_tsvm
