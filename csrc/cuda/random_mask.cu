#include "r_tsvm/random_mask.h"
#include "slices.cuh"

namespace r_tsvm {
namespace {

constexpr char kOp[] = "random_mask";

// A thread's four elements share a counter.
__global__ void __launch_bounds__(kThreads)
    mask_kernel(uint8_t* output, int64_t elements, const __grid_constant__ RandomMask mask) {
  for (int64_t slice = blockIdx.x; slice * kSlice < elements; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    uint32_t words[kItems];
    random_words(mask, index, words);
    uint8_t kept[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) kept[j] = words[j] < mask.threshold ? 1 : 0;
    store_four(kept, output, index, elements);
  }
}

}  // namespace

void random_mask_cuda(uint8_t* output, int64_t elements, const RandomMask& mask, int device, void* stream) {
  if (elements == 0) return;
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  launch_kernel(queue, "mask_kernel", slice_count(elements), kThreads, 0, mask_kernel, output, elements, mask);
}

}  // namespace r_tsvm
