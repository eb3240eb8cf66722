// One step of a sweep of bulge chasing, and of its application to vectors. Included once for each instruction set.

#include "double_vectors.h"

constexpr int kParts = kBand / kWidth;
constexpr int kTurned = RTSVM_LANES == 8 ? 3 : 2;  // vectors of a row that are turned at once

struct Step {
  const double* in;  // the reflector that arrives
  double in_factor;
  double* out;  // the one that this step makes
  double* out_factor;
};

// Makes v and f with (I - f v v^T) x = (beta, 0 ..), v[0] = 1; returns beta.
RTSVM_INLINE double reflect(const Vector* x, double* v, double* factor) {
  double values[kBand];
  std::memcpy(values, x, sizeof values);
  Vector squares = from(x[0], 1) * from(x[0], 1);
  for (int i = 1; i < kParts; ++i) squares += x[i] * x[i];
  const double tail = sum(squares), alpha = values[0];
  *factor = 0;
  std::memset(v, 0, kBand * sizeof(double));
  if (!(tail >= kNegligible)) return alpha;
  const double norm = std::sqrt(alpha * alpha + tail), beta = alpha > 0 ? -norm : norm;
  *factor = (beta - alpha) / beta;
  const double scale = 1 / (alpha - beta);
  v[0] = 1;
  for (int i = 1; i < kBand; ++i) v[i] = values[i] * scale;
  return beta;
}

// Both sides of a block on the diagonal, of which the lower half is stored. `stride` is that of columns.
RTSVM_INLINE void reflect_diagonal(double* block, int64_t stride, const double* v, double factor) {
  Vector w[kParts], p[kParts] = {};
  double products[kBand];
  for (int i = 0; i < kParts; ++i) w[i] = load(v + i * kWidth);
#pragma GCC unroll 8
  for (int first = 0; first < kParts; ++first) {
    for (int lane = 0; lane < kWidth; ++lane) {
      const int c = first * kWidth + lane;
      const double* column = block + c * stride;
      const double own = v[c];
      Vector x = load(column + first * kWidth);
      Vector product = from(x, lane + 1) * w[first];
      p[first] += from(x, lane) * own;
#pragma GCC unroll 8
      for (int i = first + 1; i < kParts; ++i) {
        x = load(column + i * kWidth);
        product += x * w[i];
        p[i] += x * own;
      }
      products[c] = sum(product);
    }
  }
  Vector inner = {};
  for (int i = 0; i < kParts; ++i) {
    p[i] = (p[i] + load(products + i * kWidth)) * factor;
    inner += p[i] * w[i];
  }
  const double half = 0.5 * factor * sum(inner);
  double q[kBand];
  for (int i = 0; i < kParts; ++i) {
    p[i] -= half * w[i];
    store(q + i * kWidth, p[i]);
  }
#pragma GCC unroll 8
  for (int first = 0; first < kParts; ++first) {
    for (int lane = 0; lane < kWidth; ++lane) {
      const int c = first * kWidth + lane;
      double* column = block + c * stride;
      const double vc = v[c], qc = q[c];
      // Lanes before the diagonal are unused rows of the column before it: they stay zero.
      Vector x = load(column + first * kWidth) - w[first] * qc - p[first] * vc;
      store(column + first * kWidth, from(x, lane));
#pragma GCC unroll 8
      for (int i = first + 1; i < kParts; ++i) {
        x = load(column + i * kWidth) - w[i] * qc - p[i] * vc;
        store(column + i * kWidth, x);
      }
    }
  }
}

// The block below: from the right, then a new reflector of its first column from the left.
RTSVM_INLINE void reflect_below(double* block, int64_t stride, const Step& step) {
  Vector w[kParts] = {}, u[kParts];
  for (int c = 0; c < kBand; ++c) {
    const double* column = block + c * stride;
    const double own = step.in[c] * step.in_factor;
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) w[i] += load(column + i * kWidth) * own;
  }
  for (int i = 0; i < kParts; ++i) u[i] = load(block + i * kWidth) - w[i] * step.in[0];
  const double beta = reflect(u, step.out, step.out_factor);
  const double factor = *step.out_factor;
  for (int i = 0; i < kParts; ++i) {
    store(block + i * kWidth, Vector{});
    u[i] = load(step.out + i * kWidth);
  }
  block[0] = beta;
  for (int c = 1; c < kBand; ++c) {
    double* column = block + c * stride;
    const double own = step.in[c];
    Vector x[kParts], even = {}, odd = {};
#pragma GCC unroll 8
    for (int i = 0; i < kParts; i += 2) {
      x[i] = load(column + i * kWidth) - w[i] * own;
      x[i + 1] = load(column + (i + 1) * kWidth) - w[i + 1] * own;
      even += x[i] * u[i];
      odd += x[i + 1] * u[i + 1];
    }
    const double product = factor * sum(even + odd);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store(column + i * kWidth, x[i] - u[i] * product);
  }
}

// `block` is the block on the diagonal that the arriving reflector covers.
void run_step(double* block, const Step& step) {
  reflect_diagonal(block, kColumn - 1, step.in, step.in_factor);
  reflect_below(block + kBand, kColumn - 1, step);
}

// The first reflector of a sweep; `column` is what it eliminates, below the diagonal.
void start_sweep(double* column, double* out, double* out_factor) {
  Vector x[kParts];
  for (int i = 0; i < kParts; ++i) x[i] = load(column + i * kWidth);
  const double beta = reflect(x, out, out_factor);
  for (int i = 0; i < kParts; ++i) store(column + i * kWidth, Vector{});
  column[0] = beta;
}

// Applies the reflectors of kFused sweeps, (I - V T V^T), to all columns of a strip. `slots` has those of V, `triangle`
// the rows of T, `rows` the first of kBand + kFused - 1 rows of kStrip numbers.
void turn_rows(const double* slots, const double* triangle, double* rows) {
  constexpr int kParts = kTurned, kRows = kBand + kFused - 1;
  for (int64_t first = 0; first < kStrip; first += kParts * kWidth) {
    Vector s[kFused][kParts] = {};
    for (int r = 0; r < kRows; ++r) {
      const double* x = rows + r * kStrip + first;
#pragma GCC unroll 4
      for (int j = 0; j < kFused; ++j) {
        const double v = slots[j * kSlot + r - j];  // before and after its own numbers, a slot has zeros
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) s[j][i] += load(x + i * kWidth) * v;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kFused; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        Vector y = s[j][i] * triangle[j * kFused + j];
#pragma GCC unroll 4
        for (int l = j + 1; l < kFused; ++l) y += s[l][i] * triangle[j * kFused + l];
        s[j][i] = y;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      double* x = rows + r * kStrip + first;
      Vector y[kParts];
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) y[i] = load(x + i * kWidth);
#pragma GCC unroll 4
      for (int j = 0; j < kFused; ++j) {
        const double v = slots[j * kSlot + r - j];
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) y[i] -= s[j][i] * v;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) store(x + i * kWidth, y[i]);
    }
  }
}
