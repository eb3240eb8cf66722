// The steps of divide and conquer on a tridiagonal matrix (Gu and Eisenstat, SIAM J. Matrix Anal. Appl. 16, 1995): the
// eigenvalues and vectors of diag(d) + rho z z^T, rho > 0, norm(z) = 1. The caller is
// r_tsvm_kernels/linalg/divide_and_conquer.py.
//
// All memory is the caller's. The bits are the same for every number of threads and every instruction set.
#pragma once

#include <cstdint>

namespace r_tsvm {

// Directions (n each) of which the eigenvalues can be read off: those with a negligible z, and one of each two with
// nearly equal d, after a rotation. `values` (d) and `weights` (z) are changed; they need not be sorted.
// `kept` gets the others by rising value, `dropped` the rest. A rotation of columns `first`, `second` of the
// basis is (first, second) <- (cosine first + sine second, cosine second - sine first), in the order of the arrays.
struct Deflation {
  int64_t* kept;
  int64_t* dropped;
  int64_t* pairs;   // (n, 2)
  double* turns;    // (n, 2): cosine and sine
  int64_t* counts;  // kept, rotations
};

void deflate_cpu(double* values, double* weights, int64_t n, double rho, double tolerance, const Deflation& output);

// The roots of 1 + rho sum_j z_j^2 / (d_j - x), for rising d without equal elements and z without zeros. Root i is
// values[origins[i]] + offsets[i], between values[i] and the next. `adjusted` gets the z for which they are exact.
void secular_roots_cpu(const double* values, const double* weights, int64_t n, double rho, int64_t* origins,
                       double* offsets, double* adjusted, int threads);

// Eigenvectors of `count` roots, of norm 1: that of wanted[w] in row rows[w] of `vectors`, whose rows have `stride`
// elements. Element j is at columns[j] of the row.
struct Wanted {
  const int64_t* roots;
  const int64_t* rows;
  int64_t count;
  const int64_t* columns;
};

void secular_vectors_cpu(const double* values, const double* adjusted, const int64_t* origins, const double* offsets,
                         int64_t n, const Wanted& wanted, double* vectors, int64_t stride, int threads);

// Turns coefficients for a basis with its columns rotated, see `Deflation`, into those for the basis itself, in each
// row.
void rotate_back_cpu(const int64_t* pairs, const double* turns, int64_t rotations, double* rows, int64_t count,
                     int64_t stride, int threads);

}  // namespace r_tsvm
