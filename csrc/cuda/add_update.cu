#include "r_tsvm/add_update.h"
#include "slices.cuh"

namespace r_tsvm {
namespace {

constexpr char kOp[] = "add_update";

template <class Real>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ MatrixView base, const __grid_constant__ MatrixView update, Real alpha,
               int64_t elements, Real* output) {
  for (int64_t slice = blockIdx.x; slice * kSlice < elements; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    Real start[kItems], step[kItems];
    const Raw<Real> raw_start = load_raw<Real>(base, index, elements);
    const Raw<Real> raw_step = load_raw<Real>(update, index, elements);
    widen(base.type, raw_start, start);
    widen(update.type, raw_step, step);
    add_step(start, alpha, step);
    store_four(start, output, index, elements);
  }
}

template <class Real>
void launch(const Queue& queue, const MatrixView& base, const MatrixView& update, double alpha, void* output) {
  const int64_t elements = element_count(base);
  launch_kernel(queue, "add_kernel", slice_count(elements), kThreads, 0, add_kernel<Real>, base, update,
                static_cast<Real>(alpha), elements, static_cast<Real*>(output));
}

}  // namespace

void add_update_cuda(const MatrixView& base, const MatrixView& update, double alpha, void* output, int device,
                     void* stream) {
  if (!is_contiguous(base) || !is_contiguous(update)) {
    throw std::runtime_error("add_update: the CUDA kernel reads contiguous tensors only");
  }
  if (element_count(base) == 0) return;
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  (any_float64(base, &update, 1) ? launch<double> : launch<float>)(queue, base, update, alpha, output);
}

}  // namespace r_tsvm
