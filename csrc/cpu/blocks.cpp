#include "blocks.h"

#include "dtype.h"
#include "isa.h"

namespace r_tsvm {
namespace {

template <class From, class Real>
RTSVM_INLINE void widen_any(const From* from, int64_t n, Real* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(widened(from[i]));
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void widen(const float* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const Float16* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const BFloat16* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const double* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const float* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const Float16* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const BFloat16* from, int64_t n, double* to) { widen_any(from, n, to); }

template <class Real>
void widen(const MatrixView& view, int64_t offset, int64_t n, Real* to) {
  switch (view.type) {
    case ElementType::kFloat64:
      // Only reached with Real = double: float64 among the inputs is what selects it.
      if constexpr (sizeof(Real) == sizeof(double)) widen(static_cast<const double*>(view.data) + offset, n, to);
      return;
    case ElementType::kFloat32:
      return widen(static_cast<const float*>(view.data) + offset, n, to);
    case ElementType::kFloat16:
      return widen(static_cast<const Float16*>(view.data) + offset, n, to);
    case ElementType::kBFloat16:
      return widen(static_cast<const BFloat16*>(view.data) + offset, n, to);
  }
}

template <class Real>
void load_any(const MatrixView& view, int64_t first, int64_t n, Real* to) {
  for_runs(view, first, n, [&](int64_t offset, int64_t length) {
    widen(view, offset, length, to);
    to += length;
  });
}

}  // namespace

void load(const MatrixView& view, int64_t first, int64_t n, float* to) { load_any(view, first, n, to); }

void load(const MatrixView& view, int64_t first, int64_t n, double* to) { load_any(view, first, n, to); }

}  // namespace r_tsvm
