// Arithmetic of task statistics. The shortcuts below rely on magnitudes never being negative.
#pragma once

#include <cmath>
#include <cstdint>

namespace r_tsvm {

// Summary of some magnitudes; all fields are zero if there are none. `max` skips NaN; `finish` recovers it from `sum`,
// which is NaN exactly if a magnitude is.
struct Moments {
  int64_t count;
  double sum;
  double squares;  // sum of squared deviations from sum / count
  double max;
  int64_t zeros;
};

// Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
inline Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double na = static_cast<double>(a.count);
  const double nb = static_cast<double>(b.count);
  const double gap = b.sum / nb - a.sum / na;
  Moments all;
  all.count = a.count + b.count;
  all.sum = a.sum + b.sum;
  all.squares = a.squares + b.squares + gap * gap * (na / (na + nb) * nb);
  all.max = a.max > b.max ? a.max : b.max;
  all.zeros = a.zeros + b.zeros;
  return all;
}

// What the second pass and the caller need for one task.
struct Summary {
  double mean;
  double sd;
  double max;
  double theta;        // a > theta is an outlier
  double small_limit;  // a <= small_limit is small
  double total;        // sum of magnitudes
};

inline Summary finish(const Moments& moments, double sigma, double eps) {
  if (moments.count == 0) return Summary{0, 0, 0, 0, 0, 0};
  const double n = static_cast<double>(moments.count);
  Summary summary;
  summary.total = moments.sum;
  summary.mean = moments.sum / n;
  summary.max = std::isnan(moments.sum) ? moments.sum : moments.max;
  if (std::isfinite(summary.mean)) {
    summary.sd = std::sqrt(moments.squares / n);
  } else {
    // Deviations from an infinite mean: inf for finite magnitudes (the sum overflowed), NaN for infinite ones.
    summary.sd = std::isfinite(summary.max) ? INFINITY : NAN;
  }
  summary.theta = std::isinf(sigma) ? sigma : summary.mean + sigma * summary.sd;
  summary.small_limit = eps * summary.mean;
  return summary;
}

// What the second pass collects.
struct Tail {
  double outlier_sum;
  int64_t small;
};

inline Tail merge(const Tail& a, const Tail& b) { return Tail{a.outlier_sum + b.outlier_sum, a.small + b.small}; }

inline double outlier_mass(const Summary& summary, const Tail& tail) {
  return summary.total > 0 ? tail.outlier_sum / summary.total : summary.total;
}

// The largest Real that is not above `limit`, so that `a > limit` can be decided in Real for every Real a.
template <class Real>
inline Real round_down(double limit) {
  const Real nearest = static_cast<Real>(limit);
  return static_cast<double>(nearest) > limit ? std::nextafter(nearest, static_cast<Real>(-INFINITY)) : nearest;
}

}  // namespace r_tsvm
