// Reduces a symmetric band matrix to tridiagonal form by chasing bulges down the band: the second stage of a two-stage
// eigensolver (Bischof, Lang and Sun, ACM TOMS 26, 2000). The caller is r_tsvm_kernels/linalg/two_stage.py.
//
// `band`: (n + 2 kBand) columns of kColumn doubles; element r of column c is A[c + r, c]. It holds the lower half of the
// matrix, whose elements are near 1 or smaller, in rows 0 .. kBand; all else is zero. Afterwards rows 0 and 1 hold the
// tridiagonal matrix.
// `reflectors`, `factors`: owned by the caller, zero. Sweep s eliminates column s with the reflectors I - f v v^T of
// steps t = 0, 1 ..: v covers rows s + 1 + t kBand and the kBand - 1 next ones. Groups of kSweeps sweeps follow each
// other. The group whose first sweep is s has ceil((n - 1 - s) / kBand) steps of kSweeps slots. A slot has kBand numbers
// for v, then kSweeps zeros, and one for f: read with a column stride one shorter than a slot, the vectors of a step
// form a matrix.
// Results depend on the instruction set in the last bits.
#pragma once

#include <cstdint>

namespace r_tsvm {

inline constexpr int64_t kBand = 64;
inline constexpr int64_t kColumn = 2 * kBand + 16;
inline constexpr int64_t kSweeps = 32;
inline constexpr int64_t kSlot = kBand + kSweeps;

void chase_bulges_cpu(double* band, int64_t n, double* reflectors, double* factors);

}  // namespace r_tsvm
