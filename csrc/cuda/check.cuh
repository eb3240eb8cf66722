// Reports errors with the op's name and CUDA's message; sets the device and restores it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace r_tsvm {

inline void check(cudaError_t status, const char* op, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op, "cannot read the current device");
    check(cudaSetDevice(device), op, "cannot use the device of the tensors");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace r_tsvm
