// The steps of a panel's QR decomposition. Included once for each instruction set.

#include "double_vectors.h"

// Adds the products of kBlock columns X with `count` columns Y, an even number, to W (kBlock, kBand), over the rows
// `first` .. `last`, multiples of 8. Columns are `height` apart.
void add_products(const double* X, const double* Y, int64_t count, int64_t height, int64_t first, int64_t last,
                  double* W) {
  for (int64_t start = first; start < last; start += kChunk) {  // in which X stays in an L1 cache
    const int64_t stop = std::min(last, start + kChunk);
    for (int64_t c = 0; c < count; c += 2) {
      const double *even = Y + c * height, *odd = even + height;
      Vector sums[2][kBlock] = {};
      for (int64_t r = start; r < stop; r += kWidth) {
        const Vector y = load(even + r), z = load(odd + r);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const Vector x = load(X + i * height + r);
          sums[0][i] += x * y;
          sums[1][i] += x * z;
        }
      }
      for (int i = 0; i < kBlock; ++i) {
        W[i * kBand + c] += sum(sums[0][i]);
        W[i * kBand + c + 1] += sum(sums[1][i]);
      }
    }
  }
}

// Subtracts X W from `count` columns Y: see above.
void subtract(const double* X, const double* W, double* Y, int64_t count, int64_t height, int64_t first, int64_t last) {
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t stop = std::min(last, start + kChunk);
    for (int64_t c = 0; c < count; c += 2) {
      double *even = Y + c * height, *odd = even + height;
      double factors[2][kBlock];
      for (int i = 0; i < kBlock; ++i) {
        factors[0][i] = W[i * kBand + c];
        factors[1][i] = W[i * kBand + c + 1];
      }
      for (int64_t r = start; r < stop; r += kWidth) {
        Vector y = load(even + r), z = load(odd + r);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const Vector x = load(X + i * height + r);
          y -= x * factors[0][i];
          z -= x * factors[1][i];
        }
        store(even + r, y);
        store(odd + r, z);
      }
    }
  }
}

// Makes the reflectors of a block, whose first row is `first`, and applies them to its other columns. In `block`,
// elements above the diagonal and on it become those of R.
void reflect_block(double* block, int64_t height, int64_t first, int64_t m, double* factors) {
  const int64_t full = first + kBlock;  // rows before it are done one by one
  for (int j = 0; j < kBlock; ++j) {
    double* own = block + j * height;
    const int64_t row = first + j;
    if (row + 1 >= m) continue;  // nothing to eliminate
    Vector squares = {};
    for (int64_t r = full; r < height; r += kWidth) squares += load(own + r) * load(own + r);
    double tail = sum(squares);
    for (int64_t r = row + 1; r < full; ++r) tail += own[r] * own[r];
    if (!(tail >= kNegligible)) {
      std::fill(own + row + 1, own + height, 0.0);
      continue;
    }
    const double alpha = own[row], norm = std::sqrt(alpha * alpha + tail), beta = alpha > 0 ? -norm : norm;
    const double factor = (beta - alpha) / beta, scale = 1 / (alpha - beta);
    factors[j] = factor;
    own[row] = beta;
    for (int64_t r = row + 1; r < full; ++r) own[r] *= scale;
    for (int64_t r = full; r < height; r += kWidth) store(own + r, load(own + r) * scale);
    for (int c = j + 1; c < kBlock; ++c) {
      double* other = block + c * height;
      Vector products = {};
      for (int64_t r = full; r < height; r += kWidth) products += load(own + r) * load(other + r);
      double product = other[row] + sum(products);
      for (int64_t r = row + 1; r < full; ++r) product += own[r] * other[r];
      product *= factor;
      other[row] -= product;
      for (int64_t r = row + 1; r < full; ++r) other[r] -= own[r] * product;
      for (int64_t r = full; r < height; r += kWidth) store(other + r, load(other + r) - load(own + r) * product);
    }
  }
}

// Multiplies kBlock columns by the upper triangle T.
void multiply(double* columns, int64_t height, const double* T) {
  for (int64_t r = 0; r < height; r += kWidth) {
#pragma GCC unroll 8
    for (int j = kBlock - 1; j >= 0; --j) {
      Vector y = load(columns + j * height + r) * T[j * kBlock + j];
#pragma GCC unroll 8
      for (int i = 0; i < j; ++i) y += load(columns + i * height + r) * T[i * kBlock + j];
      store(columns + j * height + r, y);
    }
  }
}

void make_panel(double* columns, int64_t m, int64_t stride, double* V, double* U, int64_t height) {
  load_columns(columns, m, stride, V, height);
  double factors[kBlock], T[kBlock * kBlock];
  for (int64_t first = 0; first < kBand; first += kBlock) {
    double *own = V + first * height, *rest = own + kBlock * height, *turned = U + first * height;
    std::fill_n(factors, kBlock, 0.0);
    if (first < m) reflect_block(own, height, first, m, factors);
    move_triangle(own, height, first, m, factors, columns, stride);
    std::copy_n(own, kBlock * height, turned);
    if (first >= m) continue;
    const int64_t others = kBand - first - kBlock;
    double inner[kBlock * kBand] = {}, products[kBlock * kBand] = {};
    add_products(own, own, kBlock, height, first, height, inner);
    triangle(inner, factors, T);
    add_products(own, rest, others, height, first, height, products);
    turn_back(T, products, others);
    subtract(own, products, rest, others, height, first, height);
    for (int64_t before = 0; before < first; before += kBlock) {
      double seen[kBlock * kBand] = {};
      add_products(V + before * height, own, kBlock, height, first, height, seen);
      subtract(U + before * height, seen, turned, kBlock, height, 0, height);
    }
    multiply(turned, height, T);  // U = (V_own - U V^T V_own) T, with the U and V of the blocks before
  }
}
