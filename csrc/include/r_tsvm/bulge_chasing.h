// Reduces a symmetric band matrix to tridiagonal form by chasing bulges down the band: the second stage of a two-stage
// eigensolver (Bischof, Lang and Sun, ACM TOMS 26, 2000). The caller is r_tsvm_kernels/linalg/two_stage.py.
//
// `band`: (n + 2 kBand) columns of kColumn doubles; element r of column c is A[c + r, c]. It holds the lower half of
// the matrix, whose elements are at most 2^64, in rows 0 .. kBand; all else is zero. Afterwards rows 0 and 1 hold
// the tridiagonal matrix. `reflectors`, `factors`: owned by the caller, zero. Sweep s eliminates column s with the
// reflectors I - f v v^T of steps t = 0, 1 ..: v covers rows s + 1 + t kBand and the kBand - 1 next ones. Groups of
// kSweeps sweeps follow each other. The group whose first sweep is s has ceil((n - 1 - s) / kBand) steps of kSweeps
// slots. A slot has kBand numbers for v, then zeros, and one for f. The bits do not depend on the number of threads,
// but on the instruction set: some have a fused multiply-add.
#pragma once

#include <cstdint>

namespace r_tsvm {

inline constexpr int64_t kBand = 64;
inline constexpr int64_t kColumn = 2 * kBand + 16;
inline constexpr int64_t kSweeps = 32;
inline constexpr int64_t kSlot = kBand + 8;

void chase_bulges_cpu(double* band, int64_t n, double* reflectors, double* factors, int level);

// Multiplies `vectors` (n, k), rows contiguous and `stride` apart, by the product of all reflectors in the order of the
// sweeps, from the left. Each thread copies 48 columns at a time.
void turn_by_chasing_cpu(const double* reflectors, const double* factors, double* vectors, int64_t n, int64_t k,
                         int64_t stride, int threads, int level);

}  // namespace r_tsvm
