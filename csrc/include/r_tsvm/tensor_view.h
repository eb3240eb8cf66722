// Plain views of memory that the caller owns.
#pragma once

#include <cstdint>

namespace r_tsvm {

// The codes are part of the Python boundary: ELEMENT_TYPES in r_tsvm_kernels/ops/_native.py.
enum class ElementType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

inline constexpr int kElementTypes = 4;

inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// A matrix with unit stride along its columns. Element i of the flat, logical order is at (i / cols) * row_stride + i %
// cols. A contiguous tensor of any shape is one long row.
struct MatrixView {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // in elements
  ElementType type;
};

inline int64_t element_count(const MatrixView& view) { return view.rows * view.cols; }

inline bool is_contiguous(const MatrixView& view) { return view.rows <= 1 || view.row_stride == view.cols; }

// Whether task vectors of these inputs are formed in float64 rather than float32.
inline bool any_float64(const MatrixView& base, const MatrixView* tuned, int64_t tasks) {
  bool found = base.type == ElementType::kFloat64;
  for (int64_t task = 0; task < tasks; ++task) found = found || tuned[task].type == ElementType::kFloat64;
  return found;
}

}  // namespace r_tsvm
