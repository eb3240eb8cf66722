// The QR decomposition of a panel of kBand columns: the first stage of the two-stage eigensolver reduces a matrix to a
// band by such panels. The caller is r_tsvm_kernels/linalg/two_stage.py.
//
// `columns`: (m, kBand) doubles of at most 2^64, rows contiguous and `stride` apart, m > 0. `V`, `U`: kBand columns,
// `height` doubles apart, a multiple of 8 that is at least m. Afterwards I - U V^T is the product of the reflectors,
// and the first min(m, kBand) rows of `columns` are R, the product's transpose times them. Other rows stay. V is lower
// trapezoidal with 1 on its diagonal; columns that have no reflector are zero in V and U. So are rows from m on.
#pragma once

#include <cstdint>

#include "r_tsvm/bulge_chasing.h"

namespace r_tsvm {

void panel_reflectors_cpu(double* columns, int64_t m, int64_t stride, double* V, double* U, int64_t height, int level);

}  // namespace r_tsvm
