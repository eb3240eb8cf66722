#include "r_tsvm/magnitude_ranks.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "blocks.h"
#include "row_sorter.h"

namespace r_tsvm {
namespace {

// load_row(row, keys) writes the keys of a row and returns how many are not finite.
template <class Key, class LoadRow>
void run(int64_t elements, int64_t cols, const MagnitudeRanksOutput& output, int threads, const LoadRow& load_row) {
  const int64_t workers = row_workers(elements, cols, threads);
  std::vector<RowSorter<Key>> sorters(workers, RowSorter<Key>(cols));
  std::atomic<int64_t> nonfinite{0};
  for_rows(workers, elements, cols, threads, [&](int64_t worker, int64_t row) {
    const int64_t bad = load_row(row, sorters[worker].keys());
    if (bad > 0) nonfinite += bad;
    sorters[worker].rank(output.ranks + row * cols);
  });
  *output.nonfinite = nonfinite;
}

void run_16bit(const MatrixView& x, int64_t cols, uint16_t infinity, const MagnitudeRanksOutput& output, int threads) {
  const auto load_row = [&](int64_t row, uint16_t* keys) {
    int64_t bad = 0;
    for (int64_t done = 0; done < cols; done += kBlock) {
      for_runs(x, row * cols + done, std::min(kBlock, cols - done), [&](int64_t offset, int64_t run) {
        bad += keys_of(static_cast<const uint16_t*>(x.data) + offset, run, infinity, keys);
        keys += run;
      });
    }
    return bad;
  };
  run<uint16_t>(element_count(x), cols, output, threads, load_row);
}

template <class Key>
void run_widened(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                 int threads) {
  const auto load_row = [&](int64_t row, Key* keys) { return load_keys(x, base, row * cols, cols, keys); };
  run<Key>(element_count(x), cols, output, threads, load_row);
}

}  // namespace

void magnitude_ranks_cpu(const MatrixView& x, const MatrixView* base, int64_t cols, const MagnitudeRanksOutput& output,
                         int threads) {
  if (base == nullptr && x.type == ElementType::kBFloat16) {
    run_16bit(x, cols, 0x7f80, output, threads);
  } else if (base == nullptr && x.type == ElementType::kFloat16) {
    run_16bit(x, cols, 0x7c00, output, threads);
  } else if (base == nullptr ? x.type == ElementType::kFloat64 : any_float64(*base, &x, 1)) {
    run_widened<uint64_t>(x, base, cols, output, threads);
  } else {
    run_widened<uint32_t>(x, base, cols, output, threads);
  }
}

}  // namespace r_tsvm
