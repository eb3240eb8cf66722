// Sums over a thread block in a fixed order, without atomics.
#pragma once

namespace r_tsvm {

// Returns the sum of `value` over the threads before this one, and over all of them as `total`. All kThreads threads
// must call it.
template <int kThreads, class T>
__device__ inline T block_scan(T value, T& total) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps * 32 == kThreads, "whole warps");
  __shared__ T of_warp[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, sum, distance);
    sum += lane >= distance ? below : T{0};
  }
  __syncthreads();  // the previous call has been read
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  T before = sum - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? of_warp[w] : T{0};
    total += of_warp[w];
  }
  return before;
}

}  // namespace r_tsvm
