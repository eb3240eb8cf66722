// Prints one line per CPU kernel and element type: a checksum of everything that the kernel writes. The same inputs
// must give the same lines on every processor and with every number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "r_tsvm/elect_and_sum.h"
#include "r_tsvm/magnitude_ranks.h"
#include "r_tsvm/magnitude_select.h"
#include "r_tsvm/random_mask.h"
#include "r_tsvm/ranked_mask.h"
#include "r_tsvm/reweight_prune.h"
#include "r_tsvm/task_gram.h"
#include "r_tsvm/task_spread.h"
#include "r_tsvm/task_statistics.h"

using namespace r_tsvm;

namespace {

constexpr int64_t kRows = 129, kCols = 1031, kElements = kRows * kCols;  // enough for several threads
constexpr int64_t kTasks = 3;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

uint64_t state = 1;

uint64_t next_word() {  // SplitMix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Values of several magnitudes, with zeros, subnormals of half precision, and ties.
double next_value() {
  const uint64_t word = next_word();
  const double uniform = static_cast<double>(word >> 11) * 0x1p-53 - 0.5;
  switch (word & 31) {
    case 0:
      return 0;
    case 1:
      return uniform * 0x1p-20;
    case 2:
      return uniform < 0 ? -0.25 : 0.25;
    case 3:
      return uniform * 64;
    default:
      return uniform;
  }
}

uint16_t half_bits(double value) {  // towards zero; the values are far from overflow
  if (value == 0) return 0;
  const uint16_t sign = value < 0 ? 0x8000 : 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);
  if (exponent < -13) return sign | static_cast<uint16_t>(std::ldexp(std::fabs(value), 24));
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(fraction * 2048) - 1024);
}

struct Matrix {
  std::vector<unsigned char> bytes;
  MatrixView view;
};

Matrix matrix(ElementType type) {
  static constexpr int64_t kSizes[] = {8, 4, 2, 2};
  const int64_t size = kSizes[static_cast<int>(type)], stride = kCols + 5;
  Matrix made{std::vector<unsigned char>(kRows * stride * size), {}};
  for (int64_t i = 0; i < kElements; ++i) {
    unsigned char* place = made.bytes.data() + (i / kCols * stride + i % kCols) * size;
    const double value = next_value();
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    const uint16_t brain = static_cast<uint16_t>(bits >> 16), half = half_bits(value);
    switch (type) {
      case ElementType::kFloat64:
        std::memcpy(place, &value, size);
        break;
      case ElementType::kFloat32:
        std::memcpy(place, &single, size);
        break;
      case ElementType::kFloat16:
        std::memcpy(place, &half, size);
        break;
      case ElementType::kBFloat16:
        std::memcpy(place, &brain, size);
        break;
    }
  }
  made.view = MatrixView{made.bytes.data(), kRows, kCols, stride, type};
  return made;
}

struct Line {
  std::string name;
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a

  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  }
  ~Line() { std::printf("%-28s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash)); }
};

template <class Real>
void check(ElementType type, const char* label, int threads) {
  const Matrix base = matrix(type);
  std::vector<Matrix> owners;
  for (int64_t task = 0; task < kTasks; ++task) owners.push_back(matrix(type));
  std::vector<MatrixView> tuned;
  for (const Matrix& owner : owners) tuned.push_back(owner.view);
  const auto named = [&](const char* op) { return Line{std::string(op) + " " + label}; };

  std::vector<double> mean(kTasks), sd(kTasks), max(kTasks), theta(kTasks), outlier_mass(kTasks);
  std::vector<int64_t> zeros(kTasks), small(kTasks);
  {
    Line line = named("task_statistics");
    task_statistics_cpu(
        base.view, tuned.data(), kTasks, 2.0, 0.01,
        {mean.data(), sd.data(), max.data(), zeros.data(), theta.data(), outlier_mass.data(), small.data()}, threads);
    for (const auto* values : {&mean, &sd, &max, &theta, &outlier_mass}) line.add(*values);
    line.add(zeros);
    line.add(small);
  }
  const std::vector<int64_t> keep{1, kElements / 7, kElements / 2, kElements};
  std::vector<double> threshold(keep.size());
  std::vector<int64_t> ties(keep.size()), nonfinite(1);
  for (const MatrixView* origin : {static_cast<const MatrixView*>(nullptr), &base.view}) {
    Line line = named(origin ? "magnitude_select of delta" : "magnitude_select");
    magnitude_select_cpu(tuned[0], origin, keep.data(), static_cast<int64_t>(keep.size()),
                         {threshold.data(), ties.data(), nonfinite.data()}, threads);
    line.add(threshold);
    line.add(ties);
    line.add(nonfinite);
  }
  std::vector<int32_t> ranks(kElements);
  {
    Line line = named("magnitude_ranks");
    magnitude_ranks_cpu(tuned[1], &base.view, kCols, {ranks.data(), nonfinite.data()}, threads);
    line.add(ranks);
  }
  std::vector<int64_t> thresholds(kCols);
  for (int64_t rank = 0; rank < kCols; ++rank) thresholds[rank] = (int64_t{1} << 32) * (rank + 1) / kCols;
  const RandomMask drawn{uint64_t{1} << 31, 77, 5};
  std::vector<uint8_t> mask(kElements);
  {
    Line line = named("ranked_mask");
    ranked_mask_cpu(tuned[1], &base.view, thresholds.data(), kCols, drawn, {mask.data(), nonfinite.data()}, threads);
    line.add(mask);
  }
  {
    Line line = named("random_mask");
    random_mask_cpu(mask.data(), kElements, drawn, threads);
    line.add(mask);
  }
  {
    Line line = named("reweight_prune");
    std::vector<std::vector<Real>> pruned(kTasks, std::vector<Real>(kElements));
    std::vector<PruneTask> tasks;
    for (int64_t task = 0; task < kTasks; ++task) {
      tasks.push_back({tuned[task], task ? theta[task] : kInfinity, kElements * (task + 1) / 4, pruned[task].data(),
                       nonfinite.data()});
    }
    reweight_prune_cpu(base.view, tasks.data(), kTasks, threads);
    for (const auto& values : pruned) line.add(values);
  }
  const std::vector<double> factors(kCols, 1.5);
  for (const Election election : {Election::kNone, Election::kSum, Election::kCount, Election::kUnweighted}) {
    Line line = named(("elect_and_sum " + std::to_string(static_cast<int>(election))).c_str());
    std::vector<ElectTask> tasks;
    for (int64_t task = 0; task < kTasks; ++task) {
      const bool by_rank = task == 1 && election != Election::kUnweighted;
      tasks.push_back({0.5 + 0.25 * task, 0.5 + 0.25 * task,
                       task == 0 ? Selection{threshold[1], ties[1]} : Selection{0, -1},
                       task == 0 ? Selection{threshold[0], ties[0]} : Selection{0, -1},
                       task == 2 ? drawn : RandomMask{uint64_t{1} << 32, 77, 6},
                       by_rank ? RankedSelection{ranks.data(), thresholds.data(), factors.data()}
                               : RankedSelection{nullptr, nullptr, nullptr},
                       task == 2 ? mask.data() : nullptr});
    }
    const bool elects = election != Election::kNone;
    const auto merge = [&](auto& merged, ElementType rounded) {
      elect_and_sum_cpu(base.view, tuned.data(), tasks.data(), kTasks, {election, elects, 0.125, 0.75}, merged.data(),
                        rounded, threads);
      line.add(merged);
    };
    std::vector<Real> output(kElements);
    merge(output, sizeof(Real) == sizeof(double) ? ElementType::kFloat64 : ElementType::kFloat32);
    std::vector<uint16_t> narrow(kElements);
    for (const ElementType rounded : {ElementType::kFloat16, ElementType::kBFloat16}) merge(narrow, rounded);
  }
  {
    Line line = named("task_gram");
    std::vector<double> gram(kTasks * kTasks);
    task_gram_cpu(tuned.data(), kTasks, &base.view, mask.data(), gram.data(), threads);
    line.add(gram);
  }
  {
    Line line = named("task_spread");
    std::vector<double> spread(kElements);
    task_spread_cpu(base.view, tuned.data(), kTasks, spread.data(), threads);
    line.add(spread);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  check<double>(ElementType::kFloat64, "float64", threads);
  check<float>(ElementType::kFloat32, "float32", threads);
  check<float>(ElementType::kFloat16, "float16", threads);
  check<float>(ElementType::kBFloat16, "bfloat16", threads);
}
