#include "r_tsvm/bulge_chasing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"

namespace r_tsvm {
namespace {

constexpr int kWidth = 8;
constexpr int kParts = kBand / kWidth;
static_assert(kParts == 8);

// Sums of squares below this are inexact, and nothing beside a matrix of norm 1.
constexpr double kNegligible = 0x1p-900;

// Sweeps that follow each other closely find the band in a cache.
constexpr int64_t kTogether = 8;

using Vector = double __attribute__((vector_size(64)));
using Mask = int64_t __attribute__((vector_size(64)));

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(RTSVM_ONE_ISA)
#define RTSVM_SEVERAL_ISAS 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#include "chase_steps.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#include "chase_steps.h"
}
#pragma GCC pop_options
#endif
namespace v1 {
#include "chase_steps.h"
}

int64_t steps_of(int64_t n, int64_t sweep) { return (n - 1 - sweep + kBand - 1) / kBand; }

template <class Step, class Start, class Run>
void chase(double* band, int64_t n, double* reflectors, double* factors, const Start& start, const Run& run) {
  const int64_t sweeps = n - 1;
  std::vector<int64_t> slots;  // the first one of each group
  int64_t slot = 0;
  for (int64_t first = 0; first < sweeps; first += kSweeps) {
    slots.push_back(slot);
    slot += steps_of(n, first) * kSweeps;
  }
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
        run(band + row * kColumn, Step{reflectors + own * kSlot, factors[own],
                                       last ? beyond : reflectors + next * kSlot,
                                       last ? &beyond_factor : factors + next});
      }
    }
  }
}

}  // namespace

void chase_bulges_cpu(double* band, int64_t n, double* reflectors, double* factors) {
#if defined(RTSVM_SEVERAL_ISAS)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return chase<v4::Step>(band, n, reflectors, factors, v4::start_sweep, v4::run_step);
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return chase<v3::Step>(band, n, reflectors, factors, v3::start_sweep, v3::run_step);
  }
#endif
  chase<v1::Step>(band, n, reflectors, factors, v1::start_sweep, v1::run_step);
}

}  // namespace r_tsvm
