// Runs the threads of a block as threads of the machine. All other files are built with the thread sanitizer, but not
// this one, so it does not see the waits in this file as synchronisation. This file reports the barriers to it, except
// the one that the environment variable CUDA_ON_CPU_WITHOUT names, as in "reduce.cuh:41".
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>

#include "cuda_runtime.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace r_tsvm {

// What csrc/cuda/launch.cuh declares.
alignas(16) extern uint32_t dynamic_shared[];
alignas(16) uint32_t dynamic_shared[227 * 1024 / 4];

}  // namespace r_tsvm

namespace cuda_on_cpu {
namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Tags of exchanges; cuda_runtime.h has others.
constexpr int kEnd = 0;
constexpr int kSyncWarp = 3;
constexpr int kSyncThreads = 4;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

// A counter to wait for.
class Rounds {
 public:
  unsigned now() const { return number_.load(); }

  void next() {
    ++number_;
    syscall(SYS_futex, &number_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  void wait_after(unsigned round) {
    while (now() == round) syscall(SYS_futex, &number_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
  }

 private:
  std::atomic<unsigned> number_{0};
};

class Barrier {
 public:
  void wait(unsigned threads) {
    const unsigned round = rounds_.now();
    if (waiting_.fetch_add(1) + 1 == threads) {
      waiting_ = 0;
      rounds_.next();
    } else {
      rounds_.wait_after(round);
    }
  }

 private:
  std::atomic<unsigned> waiting_{0};
  Rounds rounds_;
};

// Of everything there are two, used in turn: one thread may be at the next meeting while others leave the last one.
struct Warp {
  Rounds launches;
  Barrier barrier;
  uint64_t values[2][32];
  int tags[2][32];
  char order[2];
};

struct Launch {
  dim3 grid, block;
  size_t shared;
  const std::function<void()>* body;
};

Warp warps[kMaxThreads / 32];
Launch running;
Barrier block_barrier, end;
char start_order, end_order;
int block_tags[2][kMaxThreads / 32];
char block_order[2];
std::map<const void*, size_t> allowed;

thread_local unsigned meetings, block_meetings;

bool left_out(const char* file, int line) {
  static const char* const name = std::getenv("CUDA_ON_CPU_WITHOUT");
  if (name == nullptr) return false;
  const std::string place = std::string(file) + ":" + std::to_string(line);
  return place.size() > std::strlen(name) &&
         place.substr(place.size() - std::strlen(name) - 1) == std::string("/") + name;
}

// The lanes of a warp meet wherever one of them waits, so that none waits for ever.
const uint64_t* meet(int tag, uint64_t value, bool orders = false) {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned set = meetings++ % 2;
  warp.values[set][lane()] = value;
  warp.tags[set][lane()] = tag;
  if (orders) __tsan_release(&warp.order[set]);
  warp.barrier.wait(32);
  if (orders) __tsan_acquire(&warp.order[set]);
  for (const int other : warp.tags[set]) {
    if (other != tag) fail("the lanes of a warp are at different exchanges, or gone");
  }
  return warp.values[set];
}

void meet_block(int tag, bool orders = true) {
  meet(tag, 0);
  const unsigned set = block_meetings++ % 2;
  block_tags[set][threadIdx.x / 32] = tag;
  if (orders) __tsan_release(&block_order[set]);
  block_barrier.wait(blockDim.x);
  if (orders) __tsan_acquire(&block_order[set]);
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    if (block_tags[set][warp] != tag) fail("some threads wait for others that are gone");
  }
}

// The life of a thread of every block of every launch.
void live(unsigned thread) {
  threadIdx = dim3(thread);
  for (unsigned launches = 0;; ++launches) {
    warps[thread / 32].launches.wait_after(launches);
    __tsan_acquire(&start_order);
    blockDim = running.block;
    gridDim = running.grid;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      blockIdx = dim3(i);
      // What a block finds there is anyone's guess.
      if (thread == 0) std::memset(r_tsvm::dynamic_shared, 0xa5, running.shared);
      meet_block(kSyncThreads);
      (*running.body)();
      meet_block(kEnd);
    }
    __tsan_release(&end_order);
    end.wait(blockDim.x + 1);
  }
}

}  // namespace

void barrier(const char* file, int line) { meet_block(kSyncThreads, !left_out(file, line)); }

void warp_barrier(const char* file, int line) { meet(kSyncWarp, 0, !left_out(file, line)); }

const uint64_t* exchange(unsigned mask, int tag, uint64_t value) {
  if (mask != 0xffffffffu) fail("an exchange of a part of a warp");
  return meet(tag, value);
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > shared_limit()) fail("the device has less shared memory");
  allowed[kernel] = bytes;
}

size_t shared_limit() {
  const char* bytes = std::getenv("CUDA_ON_CPU_SHARED");
  return bytes == nullptr ? 227 * 1024 : std::strtoul(bytes, nullptr, 10);
}

void launch(dim3 grid, dim3 block, size_t shared, const void* kernel, const std::function<void()>& body) {
  if (block.x % 32 != 0 || block.x == 0 || block.x > kMaxThreads) fail("a block must have 32 to 1024 threads");
  if (shared > kSharedWithoutAsking && shared > allowed[kernel]) fail("shared memory was not asked for");
  static unsigned threads = 0;
  for (; threads < block.x; ++threads) std::thread(live, threads).detach();
  running = Launch{grid, block, shared, &body};
  __tsan_release(&start_order);
  for (unsigned warp = 0; warp < block.x / 32; ++warp) warps[warp].launches.next();
  end.wait(block.x + 1);
  __tsan_acquire(&end_order);
}

}  // namespace cuda_on_cpu
