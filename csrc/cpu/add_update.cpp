#include "r_tsvm/add_update.h"

#include <algorithm>

#include "blocks.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "store.h"

namespace r_tsvm {
namespace {

// All buffers of a slice together fit into half of a 32 KiB L1 cache.
constexpr int64_t kSlice = 512;

template <class Real>
RTSVM_INLINE void add_chunk_any(const MatrixView& base, const MatrixView& update, int64_t first, int64_t end,
                                Real alpha, void* output, ElementType type) {
  alignas(64) Real start[kSlice], step[kSlice], merged[kSlice];
  for (; first < end; first += kSlice) {
    const int64_t n = std::min(kSlice, end - first);
    load(base, first, n, start);
    load(update, first, n, step);
    add_update(start, step, n, alpha, merged);
    store(merged, n, type, output, first);
  }
}

// GCC clones functions, not templates.
RTSVM_ISA_CLONES void add_chunk(const MatrixView& base, const MatrixView& update, int64_t first, int64_t end,
                                float alpha, void* output, ElementType type) {
  add_chunk_any(base, update, first, end, alpha, output, type);
}
RTSVM_ISA_CLONES void add_chunk(const MatrixView& base, const MatrixView& update, int64_t first, int64_t end,
                                double alpha, void* output, ElementType type) {
  add_chunk_any(base, update, first, end, alpha, output, type);
}

}  // namespace

void add_update_cpu(const MatrixView& base, const MatrixView& update, double alpha, void* output, ElementType type,
                    int threads) {
  const int64_t elements = element_count(base), chunks = chunk_count(elements);
  const bool wide = any_float64(base, &update, 1);
  prefer_huge_pages(output, elements * element_bytes(type));
  const auto add = [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, end = std::min(elements, first + kChunk);
    if (wide) return add_chunk(base, update, first, end, alpha, output, type);
    add_chunk(base, update, first, end, static_cast<float>(alpha), output, type);
  };
  parallel_for(chunks, 2 * elements, threads, add, page_grain(chunks, kChunk * element_bytes(type), threads));
}

}  // namespace r_tsvm
