#include "r_tsvm/bulge_chasing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace r_tsvm {
namespace {

// So many reflectors are applied to a vector at once, and to so many vectors, of which all rows fit into an L2 cache.
constexpr int kFused = 4;
constexpr int64_t kStrip = 48;
static_assert(kSweeps % kFused == 0 && kSlot - kBand >= kFused - 1);

// Sweeps that follow each other closely find the band in a cache: with 4096 columns, that saves a tenth.
constexpr int64_t kTogether = 8;

#define RTSVM_STEPS "chase_steps.h"
#include "for_each_isa.h"

int64_t steps_of(int64_t n, int64_t sweep) { return (n - 1 - sweep + kBand - 1) / kBand; }

// The first slot of each group of sweeps, and the end.
std::vector<int64_t> first_slots(int64_t n) {
  std::vector<int64_t> slots = {0};
  for (int64_t first = 0; first < n - 1; first += kSweeps) slots.push_back(slots.back() + steps_of(n, first) * kSweeps);
  return slots;
}

template <class Step, class Start, class Run>
void chase(double* band, int64_t n, double* reflectors, double* factors, const Start& start, const Run& run) {
  const int64_t sweeps = n - 1;
  const std::vector<int64_t> slots = first_slots(n);
  const auto slot_of = [&](int64_t sweep, int64_t step) {
    return slots[sweep / kSweeps] + step * kSweeps + sweep % kSweeps;
  };
  // The last step of a sweep makes a reflector of rows beyond the matrix, which are zero.
  double beyond[kBand], beyond_factor;
  for (int64_t first = 0; first < sweeps; first += kTogether) {
    const int64_t count = std::min(kTogether, sweeps - first), most = steps_of(n, first);
    for (int64_t time = 0; time < most + count; ++time) {
      for (int64_t i = 0; i < count; ++i) {
        // A sweep may do a step when the one before it has done the next step.
        const int64_t sweep = first + i, step = time - i, steps = steps_of(n, sweep);
        if (step < 0 || step >= steps) continue;
        const int64_t own = slot_of(sweep, step), row = sweep + 1 + step * kBand;
        if (step == 0) start(band + sweep * kColumn + 1, reflectors + own * kSlot, factors + own);
        const bool last = step + 1 == steps;
        const int64_t next = last ? 0 : slot_of(sweep, step + 1);
        run(band + row * kColumn,
            Step{reflectors + own * kSlot, factors[own], last ? beyond : reflectors + next * kSlot,
                 last ? &beyond_factor : factors + next});
      }
    }
  }
}

// The upper triangle T of each kFused reflectors, for which their product is I - V T V^T: its inverse has the upper
// half of V^T V beside 1 / f.
void triangles(const double* reflectors, const double* factors, int64_t slots, double* output) {
  for (int64_t slot = 0; slot < slots; slot += kFused, output += kFused * kFused) {
    for (int j = 0; j < kFused; ++j) {
      const double* own = reflectors + (slot + j) * kSlot;
      double product[kFused] = {};
      for (int i = 0; i < j; ++i) {
        const double* other = reflectors + (slot + i) * kSlot + (j - i);
        for (int64_t r = 0; r < kBand - (j - i); ++r) product[i] += own[r] * other[r];
      }
      for (int i = 0; i < kFused; ++i) {
        double entry = i == j ? 1 : 0;
        for (int l = i; l < j; ++l) entry -= output[i * kFused + l] * product[l];
        output[i * kFused + j] = i <= j ? entry * factors[slot + j] : 0;
      }
    }
  }
}

template <class Turn>
void turn(const double* reflectors, const double* factors, double* vectors, int64_t n, int64_t k, int64_t stride,
          int threads, const Turn& turn_rows) {
  const std::vector<int64_t> slots = first_slots(n);
  std::vector<double> T(slots.back() / kFused * kFused * kFused);
  triangles(reflectors, factors, slots.back(), T.data());
  parallel_for((k + kStrip - 1) / kStrip, n * k, threads, [&](int64_t strip) {
    const int64_t first = strip * kStrip, columns = std::min(kStrip, k - first);
    std::vector<double> rows((n + kBand + kSweeps) * kStrip);  // beyond the matrix, reflectors and rows are zero
    for (int64_t r = 0; r < n; ++r) std::copy_n(vectors + r * stride + first, columns, rows.data() + r * kStrip);
    // The last sweeps first; among neighbouring sweeps the first steps first, because the rows of a step overlap with
    // those of the next step of sweeps before it.
    for (int64_t group = static_cast<int64_t>(slots.size()) - 2; group >= 0; --group) {
      const int64_t steps = (slots[group + 1] - slots[group]) / kSweeps;
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t sweep = kSweeps - kFused; sweep >= 0; sweep -= kFused) {
          const int64_t slot = slots[group] + step * kSweeps + sweep;
          turn_rows(reflectors + slot * kSlot, T.data() + slot * kFused,
                    rows.data() + (group * kSweeps + sweep + 1 + step * kBand) * kStrip);
        }
      }
    }
    for (int64_t r = 0; r < n; ++r) std::copy_n(rows.data() + r * kStrip, columns, vectors + r * stride + first);
  });
}

}  // namespace

void turn_by_chasing_cpu(const double* reflectors, const double* factors, double* vectors, int64_t n, int64_t k,
                         int64_t stride, int threads, int level) {
  (void)level;
#if defined(RTSVM_SEVERAL_ISAS)
  if (level >= 4 && __builtin_cpu_supports("x86-64-v4")) {
    return turn(reflectors, factors, vectors, n, k, stride, threads, v4::turn_rows);
  }
  if (level >= 3 && __builtin_cpu_supports("x86-64-v3")) {
    return turn(reflectors, factors, vectors, n, k, stride, threads, v3::turn_rows);
  }
#endif
  turn(reflectors, factors, vectors, n, k, stride, threads, v1::turn_rows);
}

void chase_bulges_cpu(double* band, int64_t n, double* reflectors, double* factors, int level) {
  (void)level;
#if defined(RTSVM_SEVERAL_ISAS)
  if (level >= 4 && __builtin_cpu_supports("x86-64-v4")) {
    return chase<v4::Step>(band, n, reflectors, factors, v4::start_sweep, v4::run_step);
  }
  if (level >= 3 && __builtin_cpu_supports("x86-64-v3")) {
    return chase<v3::Step>(band, n, reflectors, factors, v3::start_sweep, v3::run_step);
  }
#endif
  chase<v1::Step>(band, n, reflectors, factors, v1::start_sweep, v1::run_step);
}

}  // namespace r_tsvm
