#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

namespace r_tsvm {

// Below this many elements, starting threads costs more than it saves.
inline constexpr int64_t kParallelElements = 1 << 16;

// Calls body(0) ... body(units - 1), each once, in any order, and then throws the first exception. A body that others
// wait for must not throw. A thread takes `grain` neighbouring units at a time.
template <class Body>
void parallel_for(int64_t units, int64_t elements, int threads, const Body& body, int64_t grain = 1) {
  std::exception_ptr failure;  // an exception that left the region would end the process
  std::once_flag failed;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, grain) \
    num_threads(threads) if (threads > 1 && units > 1 && elements >= kParallelElements)
#else
  (void)elements;
  (void)threads;
  (void)grain;
#endif
  for (int64_t unit = 0; unit < units; ++unit) {
    try {
      body(unit);
    } catch (...) {
      std::call_once(failed, [&] { failure = std::current_exception(); });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace r_tsvm
