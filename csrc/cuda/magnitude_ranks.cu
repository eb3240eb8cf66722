#include <algorithm>

#include "dtype.cuh"
#include "launch.cuh"
#include "patterns.cuh"
#include "r_tsvm/magnitude_ranks.h"
#include "reduce.cuh"

// Sorts a row by its bit patterns, from the lowest digit to the highest; each pass is stable. The row is read from its
// end, so that of equal magnitudes the highest index comes first. An element's final place is its rank.
namespace r_tsvm {
namespace {

constexpr char kOp[] = "magnitude_ranks";
constexpr int kRankThreads = 512;
constexpr int kWarps = kRankThreads / 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kBlocksPerProcessor = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// The bits that the patterns of a tensor use: a 16-bit float widened to float32 has zeros below `shift`.
struct Passes {
  int shift;
  int count;
};

Passes passes_for(const MatrixView& x, bool with_base, bool in_float64) {
  if (in_float64) return Passes{0, 8};
  if (!with_base && x.type == ElementType::kBFloat16) return Passes{16, 2};
  if (!with_base && x.type == ElementType::kFloat16) return Passes{13, 3};
  return Passes{0, 4};
}

// A partly sorted row: patterns, and their positions in the row.
template <class Key>
struct Row {
  Key* keys;
  int32_t* columns;
};

template <class Key>
__host__ __device__ int64_t row_bytes(int64_t cols) {
  const int64_t even = (cols + 1) / 2 * 2;  // what follows stays aligned
  return even * static_cast<int64_t>(sizeof(Key) + sizeof(int32_t));
}

template <class Key>
__device__ Row<Key> row_at(void* memory, int64_t cols, int which) {
  char* begin = static_cast<char*>(memory) + which * row_bytes<Key>(cols);
  Key* keys = reinterpret_cast<Key*>(begin);
  return Row<Key>{keys, reinterpret_cast<int32_t*>(keys + (cols + 1) / 2 * 2)};
}

// Block b sorts the rows b, b + gridDim.x, ... in shared memory, or in its part of the workspace. Each warp has one
// stretch of the row, in order.
template <class Real>
__global__ void __launch_bounds__(kRankThreads, 2)
    rank_kernel(const __grid_constant__ MatrixView x, const __grid_constant__ MatrixView base, int64_t rows,
                int64_t cols, const __grid_constant__ Passes passes, char* workspace, int32_t* ranks,
                unsigned long long* nonfinite) {
  using Key = decltype(magnitude_bits(Real{}));
  __shared__ int offsets[kWarps][kDigits];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t stretch = (cols + kRankThreads - 1) / kRankThreads * 32;
  const int64_t first = warp * stretch < cols ? warp * stretch : cols;
  const int64_t end = first + stretch < cols ? first + stretch : cols;
  void* memory =
      workspace == nullptr ? static_cast<void*>(dynamic_shared) : workspace + blockIdx.x * 2 * row_bytes<Key>(cols);
  const Key infinity =
      static_cast<Key>(infinity_bits(sizeof(Real) == 8 ? ElementType::kFloat64 : ElementType::kFloat32));

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int pass = 0; pass < passes.count; ++pass) {
      const int shift = passes.shift + pass * kDigitBits;
      const Row<Key> from = row_at<Key>(memory, cols, (pass + 1) % 2);
      const Row<Key> to = row_at<Key>(memory, cols, pass % 2);
      const auto key_at = [&](int64_t place) {
        if (pass > 0) return from.keys[place];
        const int64_t index = row * cols + cols - 1 - place;
        const Real origin = base.data != nullptr ? element<Real>(base, index) : Real{0};
        return magnitude_bits(element<Real>(x, index) - origin);
      };
      for (int digit = lane; digit < kDigits; digit += 32) offsets[warp][digit] = 0;
      __syncthreads();

      unsigned bad = 0;
      for (int64_t place = first + lane; place < end; place += 32) {
        const Key key = key_at(place);
        bad += pass == 0 && key >= infinity ? 1 : 0;
        atomicAdd(&offsets[warp][static_cast<int>(key >> shift) & (kDigits - 1)], 1);
      }
      if (bad > 0) atomicAdd(nonfinite, static_cast<unsigned long long>(bad));
      __syncthreads();

      // Position of the first key of each digit and warp: after all smaller digits, and after the same digit of earlier
      // warps.
      const bool has_digit = threadIdx.x < kDigits;
      int sum = 0, total = 0;
      if (has_digit) {
        for (int w = 0; w < kWarps; ++w) sum += offsets[w][threadIdx.x];
      }
      int next = block_scan<kRankThreads>(sum, total);
      if (has_digit) {
        for (int w = 0; w < kWarps; ++w) {
          const int count = offsets[w][threadIdx.x];
          offsets[w][threadIdx.x] = next;
          next += count;
        }
      }
      __syncthreads();

      for (int64_t begin = first; begin < end; begin += 32) {
        const int64_t place = begin + lane;
        const bool inside = place < end;
        const Key key = inside ? key_at(place) : Key{0};
        const int digit = static_cast<int>(key >> shift) & (kDigits - 1);
        const unsigned peers = __match_any_sync(kAllLanes, inside ? digit : kDigits);
        const int before = __popc(peers & ((1u << lane) - 1));
        const int target = offsets[warp][digit] + before;
        __syncwarp();
        if (inside && before == 0) offsets[warp][digit] += __popc(peers);
        __syncwarp();
        if (!inside) continue;
        const int32_t column = pass > 0 ? from.columns[place] : static_cast<int32_t>(cols - 1 - place);
        if (pass == passes.count - 1) {
          ranks[row * cols + column] = target;
        } else {
          to.keys[target] = key;
          to.columns[target] = column;
        }
      }
    }
  }
}

// Rows in shared memory leave room for a second block.
bool fits_shared(const Queue& queue, int64_t bytes) {
  bytes += kWarps * kDigits * static_cast<int64_t>(sizeof(int));
  return bytes <= device_attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin) / 2;
}

int64_t block_count(const Queue& queue, int64_t rows) {
  const int64_t busy = int64_t{kBlocksPerProcessor} * device_attribute(queue, cudaDevAttrMultiProcessorCount);
  return std::min(rows, busy);
}

template <class Real, class Key>
void run(const Queue& queue, const MatrixView& x, const MatrixView& base, int64_t cols, int32_t* ranks,
         int64_t* nonfinite, void* workspace) {
  const int64_t rows = element_count(x) / cols;
  const int64_t bytes = 2 * row_bytes<Key>(cols);
  const bool in_shared = fits_shared(queue, bytes);
  const size_t shared = in_shared ? static_cast<size_t>(bytes) : 0;
  if (in_shared) {
    check(cudaFuncSetAttribute(rank_kernel<Real>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          queue.op, "cannot use the shared memory");
  }
  check(cudaMemsetAsync(nonfinite, 0, sizeof(int64_t), queue.stream), queue.op, "cannot clear a counter");
  const Passes passes = passes_for(x, base.data != nullptr, sizeof(Real) == sizeof(double));
  launch_kernel(queue, "rank_kernel", block_count(queue, rows), kRankThreads, shared, rank_kernel<Real>, x, base, rows,
                cols, passes, in_shared ? nullptr : static_cast<char*>(workspace), ranks,
                reinterpret_cast<unsigned long long*>(nonfinite));
}

}  // namespace

int64_t magnitude_ranks_cuda_workspace(int64_t rows, int64_t cols, bool in_float64, int device) {
  const Queue queue{kOp, device, nullptr};
  const int64_t bytes = 2 * (in_float64 ? row_bytes<uint64_t>(cols) : row_bytes<uint32_t>(cols));
  return fits_shared(queue, bytes) ? 0 : block_count(queue, rows) * bytes;
}

void magnitude_ranks_cuda(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                          void* workspace, int device, void* stream) {
  if (!is_contiguous(x) || (base != nullptr && !is_contiguous(*base))) {
    throw std::runtime_error("magnitude_ranks: the CUDA kernel reads contiguous tensors only");
  }
  if (cols < 1 || cols > 0x7fffffff || element_count(x) % cols != 0) {
    throw std::runtime_error("magnitude_ranks: the elements are not rows of this length");
  }
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  const MatrixView origin = base != nullptr ? *base : MatrixView{nullptr, 0, 0, 0, x.type};
  const auto run_real = any_float64(origin, &x, 1) ? run<double, uint64_t> : run<float, uint32_t>;
  run_real(queue, x, origin, cols, output.ranks, output.nonfinite, workspace);
}

}  // namespace r_tsvm
