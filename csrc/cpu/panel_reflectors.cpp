#include "r_tsvm/panel_reflectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"

namespace r_tsvm {
namespace {

// So many columns are applied at once, of which so many rows fit into an L1 cache.
constexpr int64_t kBlock = 8, kChunk = 256;
static_assert(kBand % kBlock == 0 && kChunk % 8 == 0);

void load_columns(const double* columns, int64_t m, int64_t stride, double* V, int64_t height) {
  for (int64_t first = 0; first < height; first += 8) {
    const int64_t rows = std::min<int64_t>(8, std::max<int64_t>(m - first, 0));
    for (int64_t c = 0; c < kBand; ++c) {
      double* own = V + c * height + first;
      for (int64_t r = 0; r < rows; ++r) own[r] = columns[(first + r) * stride + c];
      for (int64_t r = rows; r < 8; ++r) own[r] = 0;
    }
  }
}

// Moves the columns of R from a block to `columns`; puts 0 and 1 in their place.
void move_triangle(double* block, int64_t height, int64_t first, int64_t m, const double* factors, double* columns,
                   int64_t stride) {
  for (int64_t j = 0; j < kBlock; ++j) {
    const int64_t column = first + j, stop = std::min(column + 1, m);
    double* own = block + j * height;
    for (int64_t r = 0; r < std::min(m, kBand); ++r) columns[r * stride + column] = r < stop ? own[r] : 0;
    std::fill_n(own, stop, 0.0);
    if (factors[j] != 0) own[column] = 1;
  }
}

// The upper triangle T for which the product of a block's reflectors is I - V T V^T: its inverse has the upper half of
// V^T V beside 1 / f.
void triangle(const double* products, const double* factors, double* T) {
  for (int64_t j = 0; j < kBlock; ++j) {
    for (int64_t i = 0; i < kBlock; ++i) {
      double entry = i == j ? 1 : 0;
      for (int64_t l = i; l < j; ++l) entry -= T[i * kBlock + l] * products[l * kBand + j];
      T[i * kBlock + j] = i <= j ? entry * factors[j] : 0;
    }
  }
}

// Multiplies `count` columns of W (kBlock, kBand) by T^T.
void turn_back(const double* T, double* W, int64_t count) {
  for (int64_t j = kBlock - 1; j >= 0; --j) {
    for (int64_t c = 0; c < count; ++c) {
      double entry = 0;
      for (int64_t i = 0; i <= j; ++i) entry += T[i * kBlock + j] * W[i * kBand + c];
      W[j * kBand + c] = entry;
    }
  }
}

#define RTSVM_STEPS "panel_steps.h"
#include "for_each_isa.h"

}  // namespace

void panel_reflectors_cpu(double* columns, int64_t m, int64_t stride, double* V, double* U, int64_t height, int level) {
  (void)level;
#if defined(RTSVM_SEVERAL_ISAS)
  if (level >= 4 && __builtin_cpu_supports("x86-64-v4")) return v4::make_panel(columns, m, stride, V, U, height);
  if (level >= 3 && __builtin_cpu_supports("x86-64-v3")) return v3::make_panel(columns, m, stride, V, U, height);
#endif
  v1::make_panel(columns, m, stride, V, U, height);
}

}  // namespace r_tsvm
