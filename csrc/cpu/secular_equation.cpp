#include "r_tsvm/secular_equation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"
#include "lanes.h"
#include "parallel.h"

namespace r_tsvm {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon() / 2;
constexpr int kMostSteps = 100;
constexpr int64_t kGroup = 128;

// The terms of the equation over 1 / rho that belong to poles up to some index, or after it, and their derivative.
struct Terms {
  double value, slope;
};

RTSVM_INLINE Terms terms(const double* d, const double* z, int64_t first, int64_t last, double origin, double offset) {
  double value[kLanes] = {}, slope[kLanes] = {};
  const double *own = d + first, *weight = z + first;
  for_lanes(last - first, [&](int64_t j, int lane) {
    const double t = weight[j] / ((own[j] - origin) - offset);
    value[lane] += weight[j] * t;
    slope[lane] += t * t;
  });
  return {add_lanes(value), add_lanes(slope)};
}

// The root of c + s / (near - x) + t / (far - x) closest to 0 in its interval, from c x^2 - a x + b = 0.
RTSVM_INLINE double quadratic(double a, double b, double c) {
  const double root = std::sqrt(std::max(0.0, a * a - 4 * b * c));
  return a > 0 ? 2 * b / (a + root) : (a - root) / (2 * c);
}

// Finds one root: rational interpolation with a pole on either side (Li, LAPACK working note 89, "the middle way"),
// within a bracket.
RTSVM_ISA_CLONES void find_root(const double* d, const double* z, int64_t n, double rho, int64_t i, int64_t* origin,
                                double* offset) {
  const double inverse = 1 / rho;
  const bool last = i + 1 == n;
  const double gap = last ? 2 * rho : d[i + 1] - d[i];  // z has norm 1 or less
  double low = 0, high = gap, x = gap / 2;
  int64_t at = i;
  if (!last) {
    const Terms left = terms(d, z, 0, i + 1, d[i], x), right = terms(d, z, i + 1, n, d[i], x);
    const double value = inverse + left.value + right.value;
    const double own = z[i] * z[i], next = z[i + 1] * z[i + 1];
    const double rest = value + own / x - next / (gap - x);
    if (value >= 0) {
      high = x;
      x = quadratic(rest * gap + own + next, own * gap, rest);
    } else {
      at = i + 1;
      low = -x, high = 0;
      x = quadratic(own + next - rest * gap, -next * gap, rest);
    }
    if (!(x > low && x < high)) x = low + (high - low) / 2;
  }
  double width = high - low;
  for (int step = 0; step < kMostSteps; ++step) {
    const Terms left = terms(d, z, 0, i + 1, d[at], x), right = terms(d, z, i + 1, n, d[at], x);
    const double value = inverse + left.value + right.value, slope = left.slope + right.slope;
    const double rounding = kEps * (8 * (inverse - left.value + right.value) + std::abs(x) * slope);
    if (std::abs(value) <= rounding) break;
    (value < 0 ? low : high) = x;
    const double near = (d[i] - d[at]) - x;
    double move;
    if (last) {
      const double c = value - near * left.slope;
      move = near + near * near * left.slope / c;
    } else {
      const double far = (d[i + 1] - d[at]) - x;
      const double a = (near + far) * value - near * far * slope, b = near * far * value;
      move = quadratic(a, b, value - near * left.slope - far * right.slope);
    }
    if (!(value * move < 0)) move = -value / slope;
    double target = x + move;
    // Every third step must have halved the bracket.
    const bool slow = step % 3 == 2 && high - low > width / 2;
    if (step % 3 == 2) width = high - low;
    if (slow || !(target > low && target < high)) target = low + (high - low) / 2;
    if (target == x || target == low || target == high) break;
    x = target;
  }
  *origin = at;
  *offset = x;
}

// Löwner's formula for the z_i with which the roots are exact, for some i.
RTSVM_ISA_CLONES void adjust(const double* __restrict d, const double* __restrict z, const int64_t* origins,
                             const double* offsets, int64_t n, int64_t first, int64_t last,
                             double* __restrict adjusted) {
  for (int64_t i = first; i < last; ++i) adjusted[i] = 1;
  for (int64_t j = 0; j < n; ++j) {
    const double origin = d[origins[j]], offset = offsets[j], pole = d[j];
    for (int64_t i = first; i < std::min(j, last); ++i) adjusted[i] *= ((d[i] - origin) - offset) / (d[i] - pole);
    if (j >= first && j < last) adjusted[j] *= (pole - origin) - offset;
    for (int64_t i = std::max(j + 1, first); i < last; ++i) {
      adjusted[i] *= ((d[i] - origin) - offset) / (d[i] - pole);
    }
  }
  for (int64_t i = first; i < last; ++i) adjusted[i] = std::copysign(std::sqrt(std::abs(adjusted[i])), z[i]);
}

RTSVM_ISA_CLONES void eigenvector(const double* d, const double* z, int64_t n, double origin, double offset,
                                  double* vector) {
  double squares[kLanes] = {};
  for_lanes(n, [&](int64_t j, int lane) {
    const double x = z[j] / ((d[j] - origin) - offset);
    vector[j] = x;
    squares[lane] += x * x;
  });
  const double norm = std::sqrt(add_lanes(squares));
  for (int64_t j = 0; j < n; ++j) vector[j] /= norm;
}

}  // namespace

void deflate_cpu(double* values, double* weights, int64_t n, double rho, double tolerance, const Deflation& output) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  int64_t kept = 0, dropped = 0, rotations = 0, before = -1;
  for (const int64_t own : order) {
    if (rho * std::abs(weights[own]) <= tolerance) {
      output.dropped[dropped++] = own;
      continue;
    }
    if (before >= 0) {
      const double length = std::hypot(weights[own], weights[before]);
      const double cosine = weights[own] / length, sine = -weights[before] / length;
      if (std::abs((values[own] - values[before]) * cosine * sine) <= tolerance) {
        weights[own] = length;
        const double low = values[before], high = values[own];
        values[before] = low * cosine * cosine + high * sine * sine;
        values[own] = low * sine * sine + high * cosine * cosine;
        output.pairs[2 * rotations] = before;
        output.pairs[2 * rotations + 1] = own;
        output.turns[2 * rotations] = cosine;
        output.turns[2 * rotations + 1] = sine;
        ++rotations;
        output.dropped[dropped++] = before;
      } else {
        output.kept[kept++] = before;
      }
    }
    before = own;
  }
  if (before >= 0) output.kept[kept++] = before;
  output.counts[0] = kept;
  output.counts[1] = rotations;
}

void secular_roots_cpu(const double* values, const double* weights, int64_t n, double rho, int64_t* origins,
                       double* offsets, double* adjusted, int threads) {
  parallel_for(
      n, n * n, threads, [&](int64_t i) { find_root(values, weights, n, rho, i, origins + i, offsets + i); }, 16);
  parallel_for((n + kGroup - 1) / kGroup, n * n, threads, [&](int64_t group) {
    const int64_t first = group * kGroup;
    adjust(values, weights, origins, offsets, n, first, std::min(first + kGroup, n), adjusted);
  });
}

void secular_vectors_cpu(const double* values, const double* adjusted, const int64_t* origins, const double* offsets,
                         int64_t n, const Wanted& wanted, double* vectors, int64_t stride, int threads) {
  parallel_for(
      wanted.count, wanted.count * n, threads,
      [&](int64_t w) {
        std::vector<double> vector(n);
        const int64_t i = wanted.roots[w];
        eigenvector(values, adjusted, n, values[origins[i]], offsets[i], vector.data());
        double* const row = vectors + wanted.rows[w] * stride;
        for (int64_t j = 0; j < n; ++j) row[wanted.columns[j]] = vector[j];
      },
      16);
}

void rotate_back_cpu(const int64_t* pairs, const double* turns, int64_t rotations, double* rows, int64_t count,
                     int64_t stride, int threads) {
  parallel_for(
      count, count * rotations, threads,
      [&](int64_t i) {
        double* const row = rows + i * stride;
        for (int64_t r = rotations - 1; r >= 0; --r) {
          double &first = row[pairs[2 * r]], &second = row[pairs[2 * r + 1]];
          const double cosine = turns[2 * r], sine = turns[2 * r + 1], x = first;
          first = cosine * x - sine * second;
          second = sine * x + cosine * second;
        }
      },
      16);
}

}  // namespace r_tsvm
