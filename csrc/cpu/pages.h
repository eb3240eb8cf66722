// Reduces page faults in large, freshly allocated outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r_tsvm {

inline constexpr int64_t kHugePage = 2 << 20;

// Number of neighbouring units of so many bytes that a thread should take at a time. Two threads that first touch the
// same huge page both clear one, and one copy is thrown away. The number is smaller if threads would wait for each
// other.
inline int64_t page_grain(int64_t units, int64_t bytes_per_unit, int threads) {
  return std::max<int64_t>(1, std::min(kHugePage / bytes_per_unit, units / (4 * threads)));
}

// A hint. If the system accepts it, the first write to fresh memory costs a fraction of the time.
inline void prefer_huge_pages(void* address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uint64_t first = (reinterpret_cast<uintptr_t>(address) + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t last = (reinterpret_cast<uintptr_t>(address) + bytes) / kHugePage * kHugePage;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

// Freshly allocated memory for many small pieces that different threads write.
template <class T>
class Pages {
 public:
  explicit Pages(int64_t size)
      : size_(size), data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kHugePage}))) {
    prefer_huge_pages(data_.get(), size * sizeof(T));
  }

  int64_t size() const { return size_; }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{kHugePage}); }
  };

  int64_t size_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace r_tsvm
