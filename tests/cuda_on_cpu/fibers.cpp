// The threads of a block as fibers.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace r_tsvm {

// What csrc/cuda/launch.cuh declares.
alignas(16) extern thread_local uint32_t dynamic_shared[];
alignas(16) thread_local uint32_t dynamic_shared[227 * 1024 / 4];

}  // namespace r_tsvm

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
  State state = State::kDone;
  int tag = 0;
  unsigned exchanges = 0;
};

// Two sets of values: a lane may reach the next exchange while others still read those of the last one.
struct Warp {
  uint64_t values[2][32];
};

std::vector<Fiber> fibers(kMaxThreads);
Warp warps[kMaxThreads / 32];
jmp_buf scheduler;
const std::function<void()>* running;
std::map<const void*, size_t> allowed;

Fiber& current() { return fibers[threadIdx.x]; }

// Saves no signal mask, unlike swapcontext, and so makes no system call.
void leave(State state) {
  Fiber& fiber = current();
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*running)();
    leave(State::kDone);
  }
}

void resume(unsigned thread) {
  threadIdx = dim3(thread, 0, 0);
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

[[noreturn]] void fail(const std::string& what) {
  for (Fiber& fiber : fibers) fiber.started = false;  // they are stuck inside the kernel
  throw std::runtime_error("emulated kernel: " + what);
}

// Lets the lanes of a warp go on if all of them have reached the same exchange.
bool release_warp(unsigned first) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (fibers[first + lane].state != State::kAtExchange) return false;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (fibers[first + lane].tag != fibers[first].tag) fail("the lanes of a warp are at different exchanges");
    fibers[first + lane].state = State::kReady;
  }
  return true;
}

bool release_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (fibers[thread].state != State::kAtBarrier) return false;
  }
  for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].state = State::kReady;
  return true;
}

void run_block(unsigned threads, bool reverse) {
  for (unsigned thread = 0; thread < threads; ++thread) {
    fibers[thread].state = State::kReady;
    fibers[thread].exchanges = 0;
  }
  const unsigned count = threads / 32;
  for (;;) {
    unsigned done = 0;
    bool progress = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned first = 32 * (reverse ? count - 1 - i : i);
      do {
        for (unsigned j = 0; j < 32; ++j) {
          const unsigned thread = first + (reverse ? 31 - j : j);
          if (fibers[thread].state != State::kReady) continue;
          resume(thread);
          progress = true;
        }
      } while (release_warp(first));
      for (unsigned j = 0; j < 32; ++j) done += fibers[first + j].state == State::kDone ? 1 : 0;
    }
    if (done == threads) return;
    if (!release_block(threads) && !progress) fail("some threads wait for others that are elsewhere or gone");
  }
}

}  // namespace

void barrier(const char*, int) { leave(State::kAtBarrier); }

void warp_barrier(const char*, int) { exchange(0xffffffffu, 3, 0); }

const uint64_t* exchange(unsigned mask, int tag, uint64_t value) {
  Fiber& fiber = current();
  const unsigned set = fiber.exchanges++ % 2;
  uint64_t* values = warps[threadIdx.x / 32].values[set];
  values[lane()] = value;
  fiber.tag = mask == 0xffffffffu ? tag : -1 - lane();
  leave(State::kAtExchange);
  return values;
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > shared_limit()) throw std::runtime_error("emulated device: it has less shared memory");
  allowed[kernel] = bytes;
}

size_t shared_limit() {
  const char* bytes = std::getenv("CUDA_ON_CPU_SHARED");
  return bytes == nullptr ? 227 * 1024 : std::strtoul(bytes, nullptr, 10);
}

void launch(dim3 grid, dim3 block, size_t shared, const void* kernel, const std::function<void()>& body) {
  if (block.x % 32 != 0 || block.x == 0 || block.x > kMaxThreads) fail("a block must have 32 to 1024 threads");
  if (grid.x == 0 || grid.x > 0x7fffffff) fail("bad number of blocks");
  if (shared > kSharedWithoutAsking && shared > allowed[kernel]) fail("shared memory was not asked for");
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order != nullptr && std::string(order) == "reverse";
  running = &body;
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(reverse ? grid.x - 1 - i : i, 0, 0);
    std::memset(r_tsvm::dynamic_shared, 0xa5, shared);  // what a block finds there is anyone's guess
    run_block(block.x, reverse);
  }
}

}  // namespace cuda_on_cpu
