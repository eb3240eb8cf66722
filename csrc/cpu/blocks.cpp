#include "blocks.h"

#include <algorithm>
#include <cmath>

#include "dtype.h"
#include "isa.h"

namespace r_tsvm {
namespace {

template <class From, class Real>
RTSVM_INLINE void widen_any(const From* from, int64_t n, Real* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(widened(from[i]));
}

template <class From, class Real>
RTSVM_INLINE void difference_any(const From* __restrict tuned, const From* __restrict base, int64_t n, Real theta,
                                 Real* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    Real value = static_cast<Real>(widened(tuned[i])) - static_cast<Real>(widened(base[i]));
    value = value < -theta ? -theta : value;
    to[i] = value > theta ? theta : value;
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void widen(const float* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const Float16* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const BFloat16* from, int64_t n, float* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const double* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const float* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const Float16* from, int64_t n, double* to) { widen_any(from, n, to); }
RTSVM_ISA_CLONES void widen(const BFloat16* from, int64_t n, double* to) { widen_any(from, n, to); }

RTSVM_ISA_CLONES void difference(const float* tuned, const float* base, int64_t n, float theta, float* to) {
  difference_any(tuned, base, n, theta, to);
}
RTSVM_ISA_CLONES void difference(const Float16* tuned, const Float16* base, int64_t n, float theta, float* to) {
  difference_any(tuned, base, n, theta, to);
}
RTSVM_ISA_CLONES void difference(const BFloat16* tuned, const BFloat16* base, int64_t n, float theta, float* to) {
  difference_any(tuned, base, n, theta, to);
}
RTSVM_ISA_CLONES void difference(const double* tuned, const double* base, int64_t n, double theta, double* to) {
  difference_any(tuned, base, n, theta, to);
}

template <class Real>
void widen(const MatrixView& view, int64_t offset, int64_t n, Real* to) {
  switch (view.type) {
    case ElementType::kFloat64:
      // Only reached with Real = double, which any float64 input selects.
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

// Address of an element of the flat order, if it and the next n - 1 are contiguous in memory.
template <class From>
const From* side_by_side(const MatrixView& view, int64_t first, int64_t n) {
  const int64_t col = first % view.cols;
  if (!is_contiguous(view) && col + n > view.cols) return nullptr;
  return static_cast<const From*>(view.data) + first / view.cols * view.row_stride + col;
}

template <class From, class Real>
bool difference_of_same(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, Real theta,
                        Real* to) {
  const From* const a = side_by_side<From>(tuned, first, n);
  const From* const b = side_by_side<From>(base, first, n);
  if (a == nullptr || b == nullptr) return false;
  difference(a, b, n, theta, to);
  return true;
}

bool difference_of_same(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, float theta,
                        float* to) {
  if (tuned.type != base.type) return false;
  switch (tuned.type) {
    case ElementType::kFloat32:
      return difference_of_same<float>(tuned, base, first, n, theta, to);
    case ElementType::kFloat16:
      return difference_of_same<Float16>(tuned, base, first, n, theta, to);
    case ElementType::kBFloat16:
      return difference_of_same<BFloat16>(tuned, base, first, n, theta, to);
    case ElementType::kFloat64:
      return false;
  }
  return false;
}

bool difference_of_same(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, double theta,
                        double* to) {
  if (tuned.type != ElementType::kFloat64 || base.type != ElementType::kFloat64) return false;
  return difference_of_same<double>(tuned, base, first, n, theta, to);
}

template <class Real>
void load_difference_any(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, Real theta,
                         Real* to) {
  if (n == 0) return;
  if (std::isnan(theta)) {
    std::fill_n(to, n, theta);
    return;
  }
  // If the types are equal, which is the usual case, nothing is copied.
  if (difference_of_same(tuned, base, first, n, theta, to)) return;
  alignas(64) Real from[kBlock], origin[kBlock];
  load(tuned, first, n, from);
  load(base, first, n, origin);
  difference(from, origin, n, theta, to);
}

}  // namespace

void load(const MatrixView& view, int64_t first, int64_t n, float* to) { load_any(view, first, n, to); }

void load(const MatrixView& view, int64_t first, int64_t n, double* to) { load_any(view, first, n, to); }

void load_difference(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, float theta,
                     float* to) {
  load_difference_any(tuned, base, first, n, theta, to);
}

void load_difference(const MatrixView& tuned, const MatrixView& base, int64_t first, int64_t n, double theta,
                     double* to) {
  load_difference_any(tuned, base, first, n, theta, to);
}

}  // namespace r_tsvm
