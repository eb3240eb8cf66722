#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

#if !defined(_OPENMP)
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace r_tsvm {

// Below this many elements, starting threads costs more than it saves.
inline constexpr int64_t kParallelElements = 1 << 16;

#if defined(_OPENMP)

// Calls run(unit) for each unit from 0 on, in any order. A thread takes `grain` neighbouring units at a time.
template <class Run>
void run_units(int64_t units, int threads, int64_t grain, const Run& run) {
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < units; ++unit) run(unit);
}

#else

// The same where the compiler knows no OpenMP, or the wheel must not depend on its library.
template <class Run>
void run_units(int64_t units, int threads, int64_t grain, const Run& run) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t first = next.fetch_add(grain); first < units; first = next.fetch_add(grain)) {
      for (int64_t unit = first; unit < std::min(units, first + grain); ++unit) run(unit);
    }
  };
  const int64_t helpers = std::min<int64_t>(threads, (units + grain - 1) / grain) - 1;
  std::vector<std::thread> started;
  started.reserve(static_cast<size_t>(std::max<int64_t>(0, helpers)));
  for (int64_t helper = 0; helper < helpers; ++helper) {
    try {
      started.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the others do its work
    }
  }
  work();
  for (std::thread& thread : started) thread.join();
}

#endif

// Calls body(0) ... body(units - 1), each once, in any order, and then throws the first exception. A body that others
// wait for must not throw. A thread takes `grain` neighbouring units at a time.
template <class Body>
void parallel_for(int64_t units, int64_t elements, int threads, const Body& body, int64_t grain = 1) {
  std::exception_ptr failure;  // an exception that left a thread would end the process
  std::once_flag failed;
  const bool alone = units <= 1 || elements < kParallelElements;
  run_units(units, alone ? 1 : threads, grain, [&](int64_t unit) {
    try {
      body(unit);
    } catch (...) {
      std::call_once(failed, [&] { failure = std::current_exception(); });
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace r_tsvm
