// base + alpha * (combination of T sparsified task vectors). The definition is
// r_tsvm_kernels/ops/elect_and_sum/reference.py.
//
// Inputs: views of equal element count; element types and row strides may differ.
// Output: contiguous, owned by the caller, overwritten. It must not overlap the inputs. Everything is computed in
// float64 if any input is float64, else in float32, except votes, which are float64; the result is rounded once to the
// output's type, as PyTorch rounds. Order of summation: over the tasks, first to last, for each element on its own. The
// bits depend on the values alone: not on strides, on the number of threads, or on the instruction set.
#pragma once

#include <cstdint>

#include "r_tsvm/philox.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm {

// The codes are part of the Python boundary: ELECTIONS in r_tsvm_kernels/ops/elect_and_sum/cpu_kernel.py.
// In an unweighted election, the votes and sides are those of the differences before they are multiplied.
enum class Election : int { kNone = 0, kSum = 1, kCount = 2, kUnweighted = 3 };

inline constexpr int kElections = 4;

// Weight of a vote against +, so that + wins where the votes cancel up to rounding.
inline constexpr double kAgainst = 1 - 0x1p-39;

// Magnitudes above the threshold, and the first `ties` (by flat index) of those equal to it.
struct Selection {
  double threshold;
  int64_t ties;  // negative: there is no such selection
};

// Survival by the rank of a magnitude within its row. The element of rank r survives if and only if its word
// (r_tsvm/philox.h) is below thresholds[r], and is multiplied by factors[r]. The caller ensures that the tables hold
// all ranks.
struct RankedSelection {
  const int32_t* ranks;       // contiguous, of the tensors' size; null: there is no such selection
  const int64_t* thresholds;  // from 0 (never) to 2^32 (always)
  const double* factors;      // these replace ElectTask::factor
};

struct ElectTask {
  double weight;           // the task's part of the divisor
  double factor;           // factor of its differences
  Selection kept;          // these survive,
  Selection dropped;       // unless they are also among these,
  RandomMask sampled;      // or not in this mask,
  RankedSelection ranked;  // or not selected here, by the same random words; not in an unweighted election
  const uint8_t* mask;     // or 0 here: contiguous, of the tensors' size, or null
};

struct ElectOptions {
  Election election;
  bool normalize;  // only with an election: divide by the weights of the tasks that agree,
  double least;    // unless their sum is at most this in magnitude
  double alpha;
};

// Uses at most `threads` threads, one for small tensors.
void elect_and_sum_cpu(const MatrixView& base, const MatrixView* tuned, const ElectTask* tasks, int64_t count,
                       const ElectOptions& options, void* output, ElementType type, int threads);

struct ElectTaskCuda {
  double weight;
  double factor;
  int kept;  // which of the selections; negative: there is none
  int dropped;
  RandomMask sampled;
  RankedSelection ranked;  // its arrays on the device
  const uint8_t* mask;     // on the device
};

// Arrays on the device.
struct ElectSelections {
  const double* threshold;
  const int64_t* ties;
  int64_t count;
};

// Bytes of device memory, 8-byte aligned, that elect_and_sum_cuda needs; the content does not matter.
int64_t elect_and_sum_cuda_workspace(int64_t elements, int64_t tasks, int64_t selections);

// The views must be contiguous. Queues the work on `stream` (a cudaStream_t) of `device` and returns without waiting
// for the device. The inputs are read once, those with a selection twice.
void elect_and_sum_cuda(const MatrixView& base, const MatrixView* tuned, const ElectTaskCuda* tasks, int64_t count,
                        const ElectOptions& options, const ElectSelections& selections, void* output, ElementType type,
                        void* workspace, int device, void* stream);

}  // namespace r_tsvm
