// Finds the k-th largest magnitudes of tensors on the device. magnitude_select.cu provides it to the other ops.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

inline constexpr int kMaxSelections = 4;  // at once

// The magnitudes to select from: those of tensor[i], or of tensor[i] - base, clipped at theta[i]. All are contiguous.
struct Magnitudes {
  MatrixView base;  // data may be null
  MatrixView tensor[kMaxSelections];
  const double* theta[kMaxSelections];  // on the device; null clips nothing
  int64_t* nonfinite[kMaxSelections];   // out: the number of NaN and infinite values, on the device
  bool in_float64;                      // rather than float32; it must be if one of them is float64
  int tensors;
  int keeps;  // selections from each tensor; tensors * keeps <= kMaxSelections
};

struct KeepCounts {
  int64_t keep[kMaxSelections];
};

// Entry i * keeps + k is selection k from tensor i; on the device.
struct Found {
  double* threshold;  // the keep-th largest magnitude; infinity where keep is 0
  int64_t* ties;      // how many elements of exactly this magnitude are kept
  int64_t* tied;      // how many there are
};

int64_t select_magnitudes_workspace();

// Queues the work. The tensors must not be empty. The selections are meaningless if `nonfinite` is not 0.
void select_magnitudes(const Queue& queue, const Magnitudes& of, const KeepCounts& counts, const Found& found,
                       void* workspace);

}  // namespace r_tsvm
