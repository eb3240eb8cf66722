#include "random_words.h"

#include <cstring>

#include "isa.h"

#if defined(RTSVM_SEVERAL_ISAS)
#include <immintrin.h>
#endif

namespace r_tsvm {
namespace {

#if defined(RTSVM_SEVERAL_ISAS)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define RTSVM_LANES 8
#define RTSVM_WIDE_PRODUCT(a, b) _mm512_maskz_mul_epu32(0xff, (__m512i)(a), (__m512i)(b))
#include "philox_lanes.h"
#undef RTSVM_WIDE_PRODUCT
#undef RTSVM_LANES
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define RTSVM_LANES 4
#define RTSVM_WIDE_PRODUCT(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#include "philox_lanes.h"
#undef RTSVM_WIDE_PRODUCT
#undef RTSVM_LANES
}  // namespace v3
#pragma GCC pop_options
#endif

// Many counters at once, over which the compiler vectorises.
void random_words_anywhere(const RandomMask& mask, int64_t first, int64_t n, uint32_t* words) {
  constexpr int kCounters = kWordGroup / 4;
  for (int64_t done = 0; done < n; done += kWordGroup) {
    const uint64_t counter = (mask.first + static_cast<uint64_t>(first + done)) / 4;
    uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      x0[i] = static_cast<uint32_t>(counter + i);
      x1[i] = static_cast<uint32_t>((counter + i) >> 32);
      x2[i] = mask.substream;
      x3[i] = 0;
    }
    PhiloxKey key = philox_key(mask.seed);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kCounters; ++i) philox_round(key, x0[i], x1[i], x2[i], x3[i]);
      key = next_round(key);
    }
    for (int i = 0; i < kCounters; ++i) {
      words[done + 4 * i] = x0[i];
      words[done + 4 * i + 1] = x1[i];
      words[done + 4 * i + 2] = x2[i];
      words[done + 4 * i + 3] = x3[i];
    }
  }
}

}  // namespace

void random_words(const RandomMask& mask, int64_t first, int64_t n, uint32_t* words) {
#if defined(RTSVM_SEVERAL_ISAS)
  if (__builtin_cpu_supports("x86-64-v4")) return v4::random_words(mask, first, n, words);
  if (__builtin_cpu_supports("x86-64-v3")) return v3::random_words(mask, first, n, words);
#endif
  random_words_anywhere(mask, first, n, words);
}

}  // namespace r_tsvm
