// A stand-in for the CUDA runtime, so that a C++ compiler builds the very sources of csrc/cuda for the CPU. For tests.
//
// What it shows: that indices, loops, digits, ties and sums are right, that every lane takes part in every exchange of
// its warp, and that dynamic shared memory is asked for and filled before it is read. What it does not show: what nvcc
// makes of the source, or speed. Blocks run one after the other. Warps must be whole and must exchange with all 32
// lanes. Shared memory is static. The threads of a block are, by the emulator that is linked,
// - fibers.cpp: fibers on one thread of the machine; each runs until it reaches a barrier or an exchange. Fast, and
//   shows that results do not depend on the order of blocks and threads (environment variable
//   CUDA_ON_CPU_ORDER=reverse).
// - threads.cpp, with CUDA_ON_CPU_THREADS defined: threads of the machine, for the thread sanitizer, which sees the
//   races of a block. As in CUDA, __syncthreads and __syncwarp order accesses to memory, other exchanges do not. Races
//   between blocks are not seen.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#ifdef CUDA_ON_CPU_THREADS
#define __shared__ static
#define CUDA_ON_CPU_INDEX inline thread_local
#else
#define __shared__ thread_local
#define CUDA_ON_CPU_INDEX inline
#endif
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

CUDA_ON_CPU_INDEX dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// Where they stand in the source is named, so that a test can leave one out.
void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
// Waits for all lanes, which must pass the same tag; returns the values of the 32 lanes. Valid until the next but one.
const uint64_t* exchange(unsigned mask, int tag, uint64_t value);
void launch(dim3 grid, dim3 block, size_t shared, const void* kernel, const std::function<void()>& body);
void allow_shared(const void* kernel, size_t bytes);
size_t shared_limit();  // of a block, in bytes; environment variable CUDA_ON_CPU_SHARED

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) >= sizeof(From) || sizeof(From) == 8);
  To to{};
  std::memcpy(&to, &value, sizeof(to) < sizeof(value) ? sizeof(to) : sizeof(value));
  return to;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace cuda_on_cpu

// --- device functions

#define __syncthreads() cuda_on_cpu::barrier(__FILE__, __LINE__)
#define __syncwarp() cuda_on_cpu::warp_barrier(__FILE__, __LINE__)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const uint64_t* of = cuda_on_cpu::exchange(mask, 100 + distance, cuda_on_cpu::bits_as<uint64_t>(value));
  return cuda_on_cpu::bits_as<T>(of[cuda_on_cpu::lane() ^ distance]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const uint64_t* of = cuda_on_cpu::exchange(mask, 200 + distance, cuda_on_cpu::bits_as<uint64_t>(value));
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::bits_as<T>(of[lane < distance ? lane : lane - distance]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* of = cuda_on_cpu::exchange(mask, 1, vote);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(of[lane]) << lane;
  return all;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = cuda_on_cpu::bits_as<uint64_t>(value);
  const uint64_t* of = cuda_on_cpu::exchange(mask, 2, mine);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= (of[lane] == mine ? 1u : 0u) << lane;
  return same;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) double2 {
  double x, y;
};
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return cuda_on_cpu::bits_as<float>(value); }
inline long long __double_as_longlong(double value) { return cuda_on_cpu::bits_as<long long>(value); }
inline double __longlong_as_double(long long value) { return cuda_on_cpu::bits_as<double>(value); }

// --- runtime

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(cuda_on_cpu::shared_limit());
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cuda_on_cpu::launch(how->gridDim, how->blockDim, how->dynamicSmemBytes, reinterpret_cast<const void*>(kernel),
                      [&] { kernel(arguments...); });
  return cudaSuccess;
}
