// Nearly all work is done in one read of the inputs. A sample brackets the threshold. Elements outside the bracket get
// their final value. Elements inside it get a guess, and are listed; the list then gives the exact threshold and the
// few elements for which the guess was wrong. If the bracket misses or a list is full, chunks are computed again.
#include "r_tsvm/reweight_prune.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>

#include "keep.h"
#include "pages.h"
#include "sample.h"
#include "selection.h"

namespace r_tsvm {
namespace {

// Largest number of elements of a chunk, and largest share of all elements, that are listed.
constexpr int64_t kListed = kChunk / 8;
constexpr double kMostListed = 1.0 / 8;

constexpr int64_t kMostRuns = 8192;

// Bits that one pass over the undecided elements determines.
constexpr int kPassBits = 11;
constexpr int64_t kPassBins = int64_t{1} << kPassBits;

template <class Real>
struct Listed {
  Real value;
  int32_t position;  // in the chunk
};

template <class Real>
struct Chunk {
  int64_t above;
  int64_t undecided;
  int64_t tied;
  int64_t nonfinite;
  int64_t quota;       // elements equal to the threshold that survive, the first ones
  Listed<Real>* list;  // the undecided elements, or null where they must be computed again
};

template <class Real>
struct Pruning {
  explicit Pruning(int64_t elements) : chunks(chunk_count(elements)) {}

  // Whether this element of the chunk was written, not dropped.
  bool written(int64_t chunk, int64_t bits) const {
    return bits > guess.threshold || (bits == guess.threshold && chunk < tied_chunks);
  }
  bool is_single() const { return guess.bracket.least == guess.bracket.most; }
  int64_t threshold() const { return guess.bracket.least + found.prefix; }
  int64_t total(int64_t Chunk<Real>::* field) const {
    int64_t sum = 0;
    for (const Chunk<Real>& chunk : chunks) sum += chunk.*field;
    return sum;
  }

  ThresholdGuess guess{};
  Undecided found{};        // of the elements in the bracket; `prefix` counts from its lower end
  int64_t tied_chunks = 0;  // the chunks in which elements equal to the guess were written
  std::vector<Chunk<Real>> chunks;
  std::optional<Pages<Listed<Real>>> lists;
  std::atomic<int64_t> listed{0};
};

template <class Real>
int64_t nonfinite(const Real* values, int64_t n) {
  return std::count_if(values, values + n, [](Real value) { return !std::isfinite(value); });
}

template <class Real>
class Calculation {
 public:
  Calculation(const MatrixView& base, const PruneTask* tasks, int64_t count, int threads)
      : base_(base),
        elements_(element_count(base)),
        chunks_(chunk_count(elements_)),
        threads_(threads),
        workers_(worker_count(elements_, threads)),
        tasks_(tasks, tasks + count),
        prunings_(count) {
    for (int64_t task = 0; task < count; ++task) {
      prefer_huge_pages(tasks_[task].matrix, elements_ * sizeof(Real));
      *tasks_[task].nonfinite = 0;
      if (tasks_[task].keep == elements_) continue;
      prunings_[task] = std::make_unique<Pruning<Real>>(elements_);
      pruned_.push_back(task);
    }
  }

  void run() {
    guess();
    const int64_t grain = page_grain(chunks_, kChunk * sizeof(Real), threads_);
    parallel_for(chunks_, elements_, threads_, [&](int64_t chunk) { write(chunk); }, grain);
    std::vector<int64_t> finite;
    for (const int64_t task : pruned_) {
      *tasks_[task].nonfinite = prunings_[task]->total(&Chunk<Real>::nonfinite);
      if (*tasks_[task].nonfinite == 0) finite.push_back(task);
    }
    if (!finite.empty()) settle(finite);
  }

 private:
  void guess() {
    const int64_t runs = sample_runs(elements_, kMostRuns);
    const int64_t size = runs * kRun;
    const Pages<Real> samples(size * static_cast<int64_t>(tasks_.size()));
    parallel_for(runs, pruned_.size() * elements_, threads_, [&](int64_t run) {
      const int64_t first = run_start(run, runs, elements_);
      for (const int64_t task : pruned_) values_of(task, first, kRun, samples.data() + task * size + run * kRun);
    });
    parallel_for(static_cast<int64_t>(pruned_.size()), elements_, threads_, [&](int64_t index) {
      const int64_t task = pruned_[index];
      Pruning<Real>& pruning = *prunings_[task];
      const double kept = static_cast<double>(tasks_[task].keep) / static_cast<double>(elements_);
      pruning.guess = ThresholdGuess{{0, Pattern<Real>::kInfinity - 1}, Pattern<Real>::kInfinity, 1, 0};
      if (runs > 0) pruning.guess = guess_threshold(samples.data() + task * size, size, kept);
      // Room for a quarter more than expected, and one list.
      const double expected = 1.25 * std::min(pruning.guess.share, kMostListed) * static_cast<double>(elements_);
      pruning.lists.emplace(static_cast<int64_t>(expected) + kListed);
      pruning.tied_chunks = static_cast<int64_t>(pruning.guess.tie_share * static_cast<double>(chunks_));
    });
  }

  void write(int64_t chunk) {
    for (size_t task = 0; task < tasks_.size(); ++task) {
      if (prunings_[task]) {
        write_pruned(task, chunk);
        continue;
      }
      for_blocks(chunk, [&](int64_t first, int64_t n) {
        values_of(task, first, n, static_cast<Real*>(tasks_[task].matrix) + first);
      });
    }
  }

  void write_pruned(int64_t task, int64_t chunk) {
    Pruning<Real>& pruning = *prunings_[task];
    Chunk<Real>& known = pruning.chunks[chunk];
    const int64_t threshold = pruning.guess.threshold;
    const int64_t from = chunk < pruning.tied_chunks ? threshold : threshold + 1;
    alignas(64) Real values[kBlock];
    Marks inside;
    Positions positions;
    Listed<Real> list[kListed];
    for_blocks(chunk, [&](int64_t first, int64_t n) {
      values_of(task, first, n, values);
      Real* const matrix = static_cast<Real*>(tasks_[task].matrix) + first;
      const Tally tally = keep_from(values, n, from, pruning.guess.bracket, matrix, inside);
      known.above += tally.above;
      if (tally.largest >= Pattern<Real>::kInfinity) known.nonfinite += nonfinite(values, n);
      const int64_t listed = known.undecided;
      if (pruning.is_single() || listed > kListed) {
        known.undecided += count_marked(inside, n);
        return;
      }
      const int64_t found = list_marked(inside, n, positions);
      known.undecided += found;
      if (known.undecided > kListed) return;
      for (int64_t i = 0; i < found; ++i) {
        const int64_t at = positions.at[i];
        list[listed + i] = Listed<Real>{values[at], static_cast<int32_t>(first - chunk * kChunk + at)};
      }
    });
    if (pruning.is_single() || known.undecided > kListed) return;
    const int64_t place = pruning.listed.fetch_add(known.undecided, std::memory_order_relaxed);
    if (place + known.undecided > pruning.lists->size()) return;
    known.list = pruning.lists->data() + place;
    std::copy_n(list, known.undecided, known.list);
  }

  // Finds the exact thresholds and corrects the wrong guesses. All tasks share each step, because each ends with
  // threads waiting for each other.
  void settle(const std::vector<int64_t>& tasks) {
    for (const int64_t task : tasks) {
      Pruning<Real>& pruning = *prunings_[task];
      const int64_t undecided = pruning.total(&Chunk<Real>::undecided);
      pruning.found = Undecided{0, tasks_[task].keep - pruning.total(&Chunk<Real>::above), undecided};
      if (pruning.found.keep < 0 || pruning.found.keep > undecided) {
        pruning.guess.bracket = Bracket{0, Pattern<Real>::kInfinity - 1};
        for (Chunk<Real>& chunk : pruning.chunks) chunk.list = nullptr;
        pruning.found = Undecided{0, tasks_[task].keep, elements_};
      }
    }
    find(tasks);
    parallel_for(chunks_, elements_, threads_, [&](int64_t chunk) {
      for (const int64_t task : tasks) {
        Pruning<Real>& pruning = *prunings_[task];
        const int64_t threshold = pruning.threshold();
        int64_t& tied = pruning.chunks[chunk].tied;
        if (pruning.is_single()) {
          tied = pruning.chunks[chunk].undecided;
          continue;
        }
        for_undecided(task, chunk, [&](int64_t, Real value) { tied += magnitude_bits(value) == threshold; });
      }
    });
    for (const int64_t task : tasks) {
      int64_t left = prunings_[task]->found.keep;
      for (Chunk<Real>& chunk : prunings_[task]->chunks) {
        chunk.quota = std::min(left, chunk.tied);
        left -= chunk.quota;
      }
    }
    parallel_for(chunks_, elements_, threads_, [&](int64_t chunk) {
      for (const int64_t task : tasks) mend(task, chunk, prunings_[task]->threshold());
    });
  }

  // Narrows each bracket to one bit pattern, some bits at a time.
  void find(const std::vector<int64_t>& tasks) {
    int shift = 0;
    for (const int64_t task : tasks) {
      const Bracket& bracket = prunings_[task]->guess.bracket;
      while (shift < 63 && (bracket.most - bracket.least) >> shift > 0) shift += kPassBits;
    }
    while (shift > 0) {
      shift -= kPassBits;
      std::vector<Bins> bins(workers_ * tasks_.size());
      for_chunks(workers_, elements_, threads_, [&](int64_t worker, int64_t chunk) {
        for (const int64_t task : tasks) {
          if (!prunings_[task]->is_single()) count(task, chunk, shift, bins[worker * tasks_.size() + task]);
        }
      });
      for (const int64_t task : tasks) {
        if (prunings_[task]->is_single()) continue;
        std::vector<int64_t> sums(kPassBins);
        for (int64_t worker = 0; worker < workers_; ++worker) {
          const Bins& part = bins[worker * tasks_.size() + task];
          for (int64_t bin = 0; bin < kPassBins; ++bin) sums[bin] += part.even[bin] + int64_t{part.odd[bin]};
        }
        Undecided& found = prunings_[task]->found;
        const Undecided inner = pick(sums, found.keep);
        found = Undecided{(found.prefix << kPassBits) + inner.prefix, inner.keep, inner.count};
      }
    }
  }

  // One bin for each value of the next bits, and a last one for elements with another prefix. Neighbours use separate
  // counters, as in count_digits_of, and no branch depends on an element.
  struct Bins {
    uint32_t even[kPassBins + 1];
    uint32_t odd[kPassBins + 1];
  };

  void count(int64_t task, int64_t chunk, int shift, Bins& bins) const {
    const int64_t least = prunings_[task]->guess.bracket.least;
    const int64_t first = prunings_[task]->found.prefix << kPassBits;
    uint32_t* counters = bins.even;
    uint32_t* others = bins.odd;
    for_undecided(task, chunk, [&](int64_t, Real value) {
      const auto bin = static_cast<uint64_t>(((magnitude_bits(value) - least) >> shift) - first);
      ++counters[std::min<uint64_t>(bin, kPassBins)];
      std::swap(counters, others);
    });
  }

  void mend(int64_t task, int64_t chunk, int64_t threshold) {
    const Pruning<Real>& pruning = *prunings_[task];
    const Chunk<Real>& known = pruning.chunks[chunk];
    const int64_t tied_written = chunk < pruning.tied_chunks ? known.tied : 0;
    if (threshold == pruning.guess.threshold && known.quota == tied_written) return;
    Real* const matrix = static_cast<Real*>(tasks_[task].matrix) + chunk * kChunk;
    int64_t left = known.quota;
    for_undecided(task, chunk, [&](int64_t position, Real value) {
      const int64_t bits = magnitude_bits(value);
      const bool kept = bits > threshold || (bits == threshold && left-- > 0);
      if (kept != pruning.written(chunk, bits)) matrix[position] = kept ? value : Real{0};
    });
  }

  // Calls body(position in the chunk, value) for the undecided elements of a chunk, in order.
  template <class Body>
  void for_undecided(int64_t task, int64_t chunk, const Body& body) const {
    const Pruning<Real>& pruning = *prunings_[task];
    const Chunk<Real>& known = pruning.chunks[chunk];
    if (known.list) {
      for (int64_t i = 0; i < known.undecided; ++i) body(known.list[i].position, known.list[i].value);
      return;
    }
    const Bracket& bracket = pruning.guess.bracket;
    alignas(64) Real values[kBlock];
    for_blocks(chunk, [&](int64_t first, int64_t n) {
      values_of(task, first, n, values);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t bits = magnitude_bits(values[i]);
        if (bits >= bracket.least && bits <= bracket.most) body(first - chunk * kChunk + i, values[i]);
      }
    });
  }

  // Calls body(first, n) for the blocks of a chunk.
  template <class Body>
  void for_blocks(int64_t chunk, const Body& body) const {
    const int64_t end = std::min((chunk + 1) * kChunk, elements_);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) body(first, std::min(kBlock, end - first));
  }

  void values_of(int64_t task, int64_t first, int64_t n, Real* values) const {
    load_difference(tasks_[task].tuned, base_, first, n, static_cast<Real>(tasks_[task].theta), values);
  }

  const MatrixView base_;
  const int64_t elements_;
  const int64_t chunks_;
  const int threads_;
  const int64_t workers_;
  const std::vector<PruneTask> tasks_;
  std::vector<std::unique_ptr<Pruning<Real>>> prunings_;  // null where all elements are kept
  std::vector<int64_t> pruned_;
};

}  // namespace

void reweight_prune_cpu(const MatrixView& base, const PruneTask* tasks, int64_t count, int threads) {
  std::vector<MatrixView> tuned;
  for (int64_t task = 0; task < count; ++task) tuned.push_back(tasks[task].tuned);
  if (any_float64(base, tuned.data(), count)) {
    Calculation<double>(base, tasks, count, threads).run();
  } else {
    Calculation<float>(base, tasks, count, threads).run();
  }
}

}  // namespace r_tsvm
