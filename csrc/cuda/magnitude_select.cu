#include <algorithm>

#include "patterns.cuh"
#include "r_tsvm/magnitude_select.h"
#include "reduce.cuh"
#include "selection.h"
#include "slices.cuh"

// Exact selection by counting digits of magnitudes. Counts are integers, so the result does not depend on the order of
// the additions.
namespace r_tsvm {
namespace {

constexpr char kOp[] = "magnitude_select";
constexpr int kMaxBits = 11;
constexpr int kMaxPasses = 6;
constexpr int kChooseThreads = 1024;
constexpr int kPatternThreads = 1024;
constexpr int kPatternBits = 15;  // of a 16-bit float
constexpr size_t kPatternBytes = sizeof(uint32_t) << kPatternBits;
constexpr int kPatternItems = 8;  // of a thread, in one read
constexpr int kPatternTile = kPatternThreads * kPatternItems;

using Count = unsigned long long;

struct alignas(kPatternItems * sizeof(uint16_t)) Patterns {
  uint16_t item[kPatternItems];
};

// What is known about the sought magnitude after some digits: it begins with `prefix`, and `left` of the magnitudes
// with this prefix are kept.
struct Choice {
  uint64_t prefix;
  int64_t left;
};

// Digits from the top. The first one holds the exponent and so shows infinity and NaN.
struct Digits {
  int bits[kMaxPasses];
  int count;
  int all;  // bits
};

constexpr Digits kFloat32Digits{{11, 10, 10}, 3, 31};
// A 16-bit float widened to float32 has zeros below this bit.
constexpr Digits k16BitDigits{{11, 10}, 2, 31};
constexpr Digits kFloat64Digits{{11, 11, 11, 10, 10, 10}, 6, 63};

__device__ double from_bits(ElementType type, uint64_t bits) {
  switch (type) {
    case ElementType::kFloat64:
      return __longlong_as_double(static_cast<long long>(bits));
    case ElementType::kFloat32:
      return __uint_as_float(static_cast<unsigned>(bits));
    case ElementType::kFloat16: {
      const uint16_t half = static_cast<uint16_t>(bits);
      return widened(reinterpret_cast<const __half&>(half));
    }
    case ElementType::kBFloat16:
      return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  return 0;
}

// Warps count zeros together: most of a task vector may be zeros, and all threads would add to one counter.
__device__ void count_in(uint32_t* bins, bool counted, bool zero, int digit) {
  const unsigned zeros = __ballot_sync(0xffffffffu, counted && zero);
  if (counted && !zero) atomicAdd(&bins[digit], 1u);
  if (zeros != 0 && threadIdx.x % 32 == 0) atomicAdd(&bins[0], static_cast<uint32_t>(__popc(zeros)));
}

// Adds to counts[s][d] the number of magnitudes that begin with the prefix of selection s, followed by the digit d,
// which has `bits` bits and `shift` bits below it. Without `choices` it counts the first digit, which is the same for
// all selections. 32 bits are enough for one block, which reads fewer than 2^32 elements.
template <class Real>
__global__ void __launch_bounds__(kThreads) digit_kernel(const __grid_constant__ Magnitudes of, int64_t elements,
                                                         int shift, int bits, const Choice* choices, Count* counts) {
  const int bins = 1 << bits;
  const int each = choices == nullptr ? 1 : of.keeps;
  for (int i = threadIdx.x; i < of.tensors * each * bins; i += kThreads) dynamic_shared[i] = 0;
  __syncthreads();
  for (int64_t slice = blockIdx.x; slice * kSlice < elements; slice += gridDim.x) {
    const int64_t index = first_item(slice);
    const auto view_of = [&](int i) -> const MatrixView& { return of.tensor[i]; };
    Real base[kItems];
    for_differences(of.base, of.tensors, Every(), view_of, index, elements, base, [&](int i, Real(&values)[kItems]) {
      clip(of.theta[i], values);
      for (int k = 0; k < each; ++k) {
        const uint64_t wanted = choices == nullptr ? 0 : choices[i * of.keeps + k].prefix;
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          const auto pattern = magnitude_bits(values[j]);
          const bool counted = index + j < elements && (pattern >> (shift + bits)) == wanted;
          const int digit = static_cast<int>((pattern >> shift) & (bins - 1));
          count_in(dynamic_shared + (i * each + k) * bins, counted, pattern == 0, digit);
        }
      }
    });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < of.tensors * each * bins; i += kThreads) {
    const int64_t selection = static_cast<int64_t>(i / bins) * (choices == nullptr ? of.keeps : 1);
    if (dynamic_shared[i] != 0) atomicAdd(&counts[selection * bins + i % bins], static_cast<Count>(dynamic_shared[i]));
  }
}

__device__ inline Patterns load_patterns(const uint16_t* data, int64_t index, int64_t elements) {
  const uint16_t* from = data + index;
  if (index + kPatternItems <= elements && reinterpret_cast<uintptr_t>(from) % alignof(Patterns) == 0) {
    return *reinterpret_cast<const Patterns*>(from);
  }
  Patterns patterns{};
#pragma unroll
  for (int j = 0; j < kPatternItems; ++j) patterns.item[j] = index + j < elements ? from[j] : 0;
  return patterns;
}

// The same for all digits of a 16-bit float at once. The counters fill the shared memory of a processor, so one block
// has to keep enough reads in flight.
__global__ void __launch_bounds__(kPatternThreads)
    pattern_kernel(const __grid_constant__ MatrixView x, int64_t elements, Count* counts) {
  constexpr int kBins = 1 << kPatternBits;
  for (int i = threadIdx.x; i < kBins; i += kPatternThreads) dynamic_shared[i] = 0;
  __syncthreads();
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  const int64_t stride = int64_t{gridDim.x} * kPatternTile;
  const int64_t mine = static_cast<int64_t>(threadIdx.x) * kPatternItems;
  Patterns next = load_patterns(data, blockIdx.x * int64_t{kPatternTile} + mine, elements);
  for (int64_t first = blockIdx.x * int64_t{kPatternTile}; first < elements; first += stride) {
    const int64_t index = first + mine;
    const Patterns patterns = next;
    next = load_patterns(data, index + stride, elements);
#pragma unroll
    for (int j = 0; j < kPatternItems; ++j) {
      const int pattern = patterns.item[j] & (kBins - 1);
      count_in(dynamic_shared, index + j < elements, pattern == 0, pattern);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kPatternThreads) {
    if (dynamic_shared[i] != 0) atomicAdd(&counts[i], static_cast<Count>(dynamic_shared[i]));
  }
}

// Thread block s finds the digit of the magnitude that selection s seeks, from the counts.
__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ Magnitudes of, const __grid_constant__ KeepCounts keep,
                  const __grid_constant__ Found found, ElementType type, int shift, int bits, bool first, bool last,
                  const Count* counts, Choice* choices) {
  const int selection = blockIdx.x;
  const int tensor = selection / of.keeps;
  const int bins = 1 << bits;
  counts += static_cast<int64_t>(first ? tensor * of.keeps : selection) * bins;
  const int64_t keep_one = keep.keep[selection] > 0 ? keep.keep[selection] : 1;
  Choice choice = first ? Choice{0, keep_one} : choices[selection];
  // Each thread has some neighbouring bins, the largest digits first.
  const int each = (bins + kChooseThreads - 1) / kChooseThreads;
  const int high = bins - static_cast<int>(threadIdx.x) * each;
  const int low = high > each ? high - each : 0;
  const int infinite = static_cast<int>(infinity_bits(type) >> shift);
  int64_t mine = 0, nonfinite = 0, total = 0;
  for (int digit = low; digit < high; ++digit) {
    const int64_t count = static_cast<int64_t>(counts[digit]);
    mine += count;
    nonfinite += digit >= infinite ? count : 0;
  }
  int64_t above = block_scan<kChooseThreads>(mine, total);  // also a barrier: every thread has read its choice
  if (first && selection % of.keeps == 0) {
    block_scan<kChooseThreads>(nonfinite, total);
    if (threadIdx.x == 0) *of.nonfinite[tensor] = total;
  }
  if (above >= choice.left || above + mine < choice.left) return;
  // Only the thread that has the bin remains.
  int digit = high - 1;
  while (above + static_cast<int64_t>(counts[digit]) < choice.left) above += static_cast<int64_t>(counts[digit--]);
  choice = Choice{choice.prefix << bits | static_cast<uint64_t>(digit), choice.left - above};
  choices[selection] = choice;
  if (last) {
    const bool none = keep.keep[selection] == 0;
    found.threshold[selection] = none ? INFINITY : from_bits(type, choice.prefix << shift);
    found.ties[selection] = none ? 0 : choice.left;
    found.tied[selection] = static_cast<int64_t>(counts[digit]);
  }
}

size_t counts_bytes(int selections, int passes, int bits) {
  return sizeof(Count) * static_cast<size_t>(selections * passes) << bits;
}

template <class Real>
void count_digits(const Queue& queue, const Magnitudes& of, int shift, int bits, const Choice* choices, Count* counts) {
  const int64_t elements = element_count(of.tensor[0]);
  const size_t bytes = sizeof(uint32_t) * (of.tensors * (choices == nullptr ? 1 : of.keeps)) << bits;
  const int64_t blocks = std::min(slice_count(elements), resident_blocks(queue, digit_kernel<Real>, kThreads, bytes));
  launch_kernel(queue, "digit_kernel", blocks, kThreads, bytes, digit_kernel<Real>, of, elements, shift, bits, choices,
                counts);
}

template <class Real>
void select_by_digits(const Queue& queue, const Magnitudes& of, const Digits& digits, const KeepCounts& keep,
                      const Found& found, Count* counts, Choice* choices) {
  const int selections = of.tensors * of.keeps;
  const ElementType type = sizeof(Real) == sizeof(double) ? ElementType::kFloat64 : ElementType::kFloat32;
  check(cudaMemsetAsync(counts, 0, counts_bytes(selections, digits.count, kMaxBits), queue.stream), queue.op,
        "cannot clear the counters");
  int shift = digits.all;
  for (int pass = 0; pass < digits.count; ++pass) {
    const int bits = digits.bits[pass];
    shift -= bits;
    count_digits<Real>(queue, of, shift, bits, pass == 0 ? nullptr : choices, counts);
    launch_kernel(queue, "choose_kernel", selections, kChooseThreads, 0, choose_kernel, of, keep, found, type, shift,
                  bits, pass == 0, pass == digits.count - 1, counts, choices);
    counts += selections << kMaxBits;
  }
}

// Reads a 16-bit float once. All selections share the counts.
void select_by_pattern(const Queue& queue, const Magnitudes& of, const KeepCounts& keep, const Found& found,
                       Count* counts, Choice* choices) {
  const MatrixView& x = of.tensor[0];
  const int64_t elements = element_count(x);
  const int64_t blocks = (elements + kPatternTile - 1) / kPatternTile;
  const int64_t busy = device_attribute(queue, cudaDevAttrMultiProcessorCount);
  check(cudaMemsetAsync(counts, 0, counts_bytes(1, 1, kPatternBits), queue.stream), queue.op,
        "cannot clear the counters");
  check(cudaFuncSetAttribute(pattern_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPatternBytes), queue.op,
        "cannot use the shared memory");
  launch_kernel(queue, "pattern_kernel", std::min(blocks, busy), kPatternThreads, kPatternBytes, pattern_kernel, x,
                elements, counts);
  launch_kernel(queue, "choose_kernel", of.keeps, kChooseThreads, 0, choose_kernel, of, keep, found, x.type, 0,
                kPatternBits, true, true, counts, choices);
}

bool is_16bit(const MatrixView& view) {
  return view.type == ElementType::kFloat16 || view.type == ElementType::kBFloat16;
}

}  // namespace

int64_t select_magnitudes_workspace() {
  static_assert(kMaxSelections * kMaxPasses << kMaxBits >= 1 << kPatternBits);
  return static_cast<int64_t>(counts_bytes(kMaxSelections, kMaxPasses, kMaxBits) + kMaxSelections * sizeof(Choice));
}

void select_magnitudes(const Queue& queue, const Magnitudes& of, const KeepCounts& keep, const Found& found,
                       void* workspace) {
  Count* counts = static_cast<Count*>(workspace);
  Choice* choices = reinterpret_cast<Choice*>(counts + (kMaxSelections * kMaxPasses << kMaxBits));
  const bool alone = of.tensors == 1 && of.base.data == nullptr && of.theta[0] == nullptr && is_16bit(of.tensor[0]);
  if (of.in_float64) {
    select_by_digits<double>(queue, of, kFloat64Digits, keep, found, counts, choices);
  } else if (!alone) {
    select_by_digits<float>(queue, of, kFloat32Digits, keep, found, counts, choices);
  } else if (device_attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin) >= static_cast<int>(kPatternBytes)) {
    select_by_pattern(queue, of, keep, found, counts, choices);
  } else {
    select_by_digits<float>(queue, of, k16BitDigits, keep, found, counts, choices);
  }
}

int64_t magnitude_select_cuda_workspace() {
  return select_magnitudes_workspace() + kMaxSelections * static_cast<int64_t>(sizeof(int64_t));
}

void magnitude_select_cuda(const MatrixView& x, const MatrixView* base, const int64_t* keep, int64_t count,
                           const MagnitudeSelectOutput& output, void* workspace, int device, void* stream) {
  if (!is_contiguous(x) || (base != nullptr && !is_contiguous(*base))) {
    throw std::runtime_error("magnitude_select: the CUDA kernel reads contiguous tensors only");
  }
  const DeviceGuard guard(device, kOp);
  const Queue queue{kOp, device, static_cast<cudaStream_t>(stream)};
  int64_t* tied = static_cast<int64_t*>(workspace);
  // Later launches reuse the workspace: they follow on the same stream.
  for (int64_t first = 0; first < count; first += kMaxSelections) {
    Magnitudes of{};
    of.base = base != nullptr ? *base : MatrixView{nullptr, 0, 0, 0, x.type};
    of.tensor[0] = x;
    of.nonfinite[0] = output.nonfinite;
    of.in_float64 = any_float64(of.base, &x, 1);
    of.tensors = 1;
    of.keeps = static_cast<int>(std::min<int64_t>(kMaxSelections, count - first));
    KeepCounts keeps{};
    std::copy(keep + first, keep + first + of.keeps, keeps.keep);
    select_magnitudes(queue, of, keeps, Found{output.threshold + first, output.ties + first, tied},
                      tied + kMaxSelections);
  }
}

}  // namespace r_tsvm
