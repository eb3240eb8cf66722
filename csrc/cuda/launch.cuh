// Launches kernels, and cuts tensors into pieces.
#pragma once

#include <algorithm>
#include <cstdint>

#include "check.cuh"

namespace r_tsvm {

// Where the work of an op is queued.
struct Queue {
  const char* op;
  int device;
  cudaStream_t stream;
};

// Threads of a block.
inline constexpr int kThreads = 256;

// Shared memory whose size is chosen at launch.
alignas(16) extern __shared__ uint32_t dynamic_shared[];

// Queues kernel(arguments...) with at most `blocks` blocks; the kernels loop over the rest.
template <class... Parameters, class... Arguments>
void launch_kernel(const Queue& queue, const char* name, int64_t blocks, int threads, size_t shared_bytes,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 0x7fffffff)), 1, 1);
  how.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  how.dynamicSmemBytes = shared_bytes;
  how.stream = queue.stream;
  const cudaError_t status = cudaLaunchKernelEx(&how, kernel, static_cast<Arguments&&>(arguments)...);
  check(status, queue.op, (std::string("launch of ") + name + " failed").c_str());
}

inline int device_attribute(const Queue& queue, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, queue.device), queue.op, "cannot read an attribute of the device");
  return value;
}

// How many blocks of a kernel run at the same time. More of a kernel that loops would run after the first ones, alone.
template <class... Parameters>
int64_t resident_blocks(const Queue& queue, void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), queue.op,
        "cannot read how many blocks fit a processor");
  return std::max<int64_t>(blocks, 1) * device_attribute(queue, cudaDevAttrMultiProcessorCount);
}

}  // namespace r_tsvm
