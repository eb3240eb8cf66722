// Fewer page faults under large outputs that nobody has touched yet.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r_tsvm {

// A hint: where the system takes it, first writing to fresh memory costs a fraction.
inline void prefer_huge_pages(void* address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t kHuge = 2u << 20;
  const uint64_t first = (reinterpret_cast<uintptr_t>(address) + kHuge - 1) / kHuge * kHuge;
  const uint64_t last = (reinterpret_cast<uintptr_t>(address) + bytes) / kHuge * kHuge;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace r_tsvm
