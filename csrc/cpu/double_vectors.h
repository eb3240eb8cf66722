// Vectors of RTSVM_LANES doubles. Included once for each instruction set, within a namespace, and so without a guard:
// the compiler splits vectors into those of the processor for which a function is written, before it would clone the
// function for others.

constexpr int kWidth = RTSVM_LANES;

// Sums of squares below this are inexact, and nothing beside a matrix whose largest element is near 1.
constexpr double kNegligible = 0x1p-900;

using Vector = double __attribute__((vector_size(8 * RTSVM_LANES)));
using Mask = int64_t __attribute__((vector_size(8 * RTSVM_LANES)));

RTSVM_INLINE Vector load(const double* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

RTSVM_INLINE void store(double* to, const Vector& x) { std::memcpy(to, &x, sizeof x); }

#if RTSVM_LANES == 8
constexpr Mask kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};

RTSVM_INLINE double sum(const Vector& x) {
  using Half = double __attribute__((vector_size(32)));
  using Quarter = double __attribute__((vector_size(16)));
  const Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  const Quarter quarter = __builtin_shufflevector(half, half, 0, 1) + __builtin_shufflevector(half, half, 2, 3);
  return quarter[0] + quarter[1];
}
#elif RTSVM_LANES == 4
constexpr Mask kLaneNumbers = {0, 1, 2, 3};

RTSVM_INLINE double sum(const Vector& x) {
  using Half = double __attribute__((vector_size(16)));
  const Half half = __builtin_shufflevector(x, x, 0, 1) + __builtin_shufflevector(x, x, 2, 3);
  return half[0] + half[1];
}
#else
constexpr Mask kLaneNumbers = {0, 1};

RTSVM_INLINE double sum(const Vector& x) { return x[0] + x[1]; }
#endif

// The lanes from `first` on; the others become 0, whatever they hold.
RTSVM_INLINE Vector from(const Vector& x, int64_t first) { return (Vector)((Mask)x & (kLaneNumbers >= first)); }
