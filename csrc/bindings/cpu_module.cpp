#include <pybind11/functional.h>

#include "../cpu/pages.h"
#include "arguments.h"
#include "r_tsvm/add_update.h"
#include "r_tsvm/bulge_chasing.h"
#include "r_tsvm/elect_and_sum.h"
#include "r_tsvm/largest_magnitude.h"
#include "r_tsvm/magnitude_ranks.h"
#include "r_tsvm/panel_reflectors.h"
#include "r_tsvm/random_mask.h"
#include "r_tsvm/ranked_mask.h"
#include "r_tsvm/secular_equation.h"
#include "r_tsvm/spread_mask.h"
#include "r_tsvm/spread_select.h"
#include "r_tsvm/task_gram.h"
#include "r_tsvm/task_spread.h"

namespace py = pybind11;
using namespace r_tsvm;

namespace {

// threshold, seed, substream, index of the first element
using RandomMaskArgument = std::tuple<uint64_t, uint64_t, uint32_t, uint64_t>;

// addresses of ranks (0 for none), thresholds and factors
using RankedArgument = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// weight, factor; threshold and ties of what is kept and of what is dropped again, ties < 0 for none; random mask;
// selection by rank; address of a mask (0 for none)
using ElectTaskArgument = std::tuple<double, double, std::tuple<double, int64_t>, std::tuple<double, int64_t>,
                                     RandomMaskArgument, RankedArgument, std::uintptr_t>;

// kept, dropped, pairs, turns, counts
using DeflationAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// origins, offsets, adjusted weights
using SecularAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// roots, rows, count, columns
using WantedArgument = std::tuple<std::uintptr_t, std::uintptr_t, int64_t, std::uintptr_t>;

RandomMask random_mask(const RandomMaskArgument& argument) {
  const auto [threshold, seed, substream, first] = argument;
  return RandomMask{threshold, seed, substream, first};
}

ElectTask elect_task(const ElectTaskArgument& argument) {
  const auto& [weight, factor, kept, dropped, sampled, ranked, mask] = argument;
  const auto [ranks, thresholds, factors] = ranked;
  return ElectTask{
      weight,
      factor,
      Selection{std::get<0>(kept), std::get<1>(kept)},
      Selection{std::get<0>(dropped), std::get<1>(dropped)},
      random_mask(sampled),
      RankedSelection{bindings::pointer<const int32_t>(ranks), bindings::pointer<const int64_t>(thresholds),
                      bindings::pointer<const double>(factors)},
      bindings::pointer<const uint8_t>(mask)};
}

// One view, or none.
std::vector<MatrixView> optional_matrix(const std::optional<bindings::MatrixArgument>& base, const MatrixView& x,
                                        const char* op) {
  return bindings::matrices(base ? std::vector{*base} : std::vector<bindings::MatrixArgument>{}, x, op);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
  module.doc() = "CPU kernels. Addresses in, nothing out; the caller checks shapes and keeps the tensors alive.";

  module.def(
      "task_statistics",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned, double sigma,
         double eps, const bindings::TaskStatisticsAddresses& output, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "task_statistics");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "task_statistics");
        task_statistics_cpu(base_view, views.data(), static_cast<int64_t>(views.size()), sigma, eps,
                            bindings::task_statistics_output(output), threads);
      },
      py::arg("base"), py::arg("tuned"), py::arg("sigma"), py::arg("eps"), py::arg("output"), py::arg("threads"));

  module.def(
      "magnitude_ranks",
      [](const bindings::MatrixArgument& x, const std::optional<bindings::MatrixArgument>& base, int64_t cols,
         const std::tuple<std::uintptr_t, std::uintptr_t>& output, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView view = bindings::matrix(x, "magnitude_ranks");
        const std::vector<MatrixView> bases = optional_matrix(base, view, "magnitude_ranks");
        if (cols < 1 || element_count(view) % cols != 0) throw std::runtime_error("magnitude_ranks: not whole rows");
        const auto [ranks, nonfinite] = output;
        magnitude_ranks_cpu(
            view, bases.empty() ? nullptr : &bases[0], cols,
            MagnitudeRanksOutput{bindings::pointer<int32_t>(ranks), bindings::pointer<int64_t>(nonfinite)}, threads);
      },
      py::arg("x"), py::arg("base"), py::arg("cols"), py::arg("output"), py::arg("threads"));

  module.def(
      "magnitude_select",
      [](const bindings::MatrixArgument& x, const std::optional<bindings::MatrixArgument>& base,
         const std::vector<int64_t>& keep, const bindings::MagnitudeSelectAddresses& output, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView view = bindings::matrix(x, "magnitude_select");
        const std::vector<MatrixView> bases = optional_matrix(base, view, "magnitude_select");
        magnitude_select_cpu(view, bases.empty() ? nullptr : &bases[0], keep.data(), static_cast<int64_t>(keep.size()),
                             bindings::magnitude_select_output(output), threads);
      },
      py::arg("x"), py::arg("base"), py::arg("keep"), py::arg("output"), py::arg("threads"));

  module.def(
      "reweight_prune",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::PruneArgument>& tasks, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "reweight_prune");
        const std::vector<PruneTask> views = bindings::prune_tasks(tasks, base_view);
        reweight_prune_cpu(base_view, views.data(), static_cast<int64_t>(views.size()), threads);
      },
      py::arg("base"), py::arg("tasks"), py::arg("threads"));

  module.def(
      "elect_and_sum",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned,
         const std::vector<ElectTaskArgument>& tasks, int election, bool normalize, double least, double alpha,
         std::uintptr_t output, int type, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "elect_and_sum");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "elect_and_sum");
        if (tasks.size() != views.size()) throw std::runtime_error("elect_and_sum: not one task per tensor");
        if (election < 0 || election >= kElections) throw std::runtime_error("elect_and_sum: unknown election code");
        std::vector<ElectTask> rules;
        for (const ElectTaskArgument& task : tasks) rules.push_back(elect_task(task));
        elect_and_sum_cpu(base_view, views.data(), rules.data(), static_cast<int64_t>(views.size()),
                          ElectOptions{static_cast<Election>(election), normalize, least, alpha},
                          bindings::pointer<void>(output), bindings::element_type(type, "elect_and_sum"), threads);
      },
      py::arg("base"), py::arg("tuned"), py::arg("tasks"), py::arg("election"), py::arg("normalize"), py::arg("least"),
      py::arg("alpha"), py::arg("output"), py::arg("type"), py::arg("threads"));

  module.def(
      "random_mask",
      [](std::uintptr_t output, int64_t elements, const RandomMaskArgument& mask, int threads) {
        const py::gil_scoped_release unlocked;
        random_mask_cpu(bindings::pointer<uint8_t>(output), elements, random_mask(mask), threads);
      },
      py::arg("output"), py::arg("elements"), py::arg("mask"), py::arg("threads"));

  module.def(
      "ranked_mask",
      [](const bindings::MatrixArgument& x, const std::optional<bindings::MatrixArgument>& base,
         const std::tuple<std::uintptr_t, int64_t>& table, const std::tuple<uint64_t, uint32_t>& drawn,
         const std::tuple<std::uintptr_t, std::uintptr_t>& output, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView view = bindings::matrix(x, "ranked_mask");
        const std::vector<MatrixView> bases = optional_matrix(base, view, "ranked_mask");
        const auto [thresholds, cols] = table;
        const auto [seed, substream] = drawn;
        if (cols < 1 || element_count(view) % cols != 0) throw std::runtime_error("ranked_mask: not whole rows");
        const auto [mask, nonfinite] = output;
        ranked_mask_cpu(view, bases.empty() ? nullptr : &bases[0], bindings::pointer<const int64_t>(thresholds), cols,
                        RandomMask{0, seed, substream},
                        RankedMaskOutput{bindings::pointer<uint8_t>(mask), bindings::pointer<int64_t>(nonfinite)},
                        threads);
      },
      py::arg("x"), py::arg("base"), py::arg("table"), py::arg("drawn"), py::arg("output"), py::arg("threads"));

  module.def(
      "prefer_huge_pages",
      [](std::uintptr_t address, uint64_t bytes) { prefer_huge_pages(bindings::pointer<void>(address), bytes); },
      py::arg("address"), py::arg("bytes"));

  module.def(
      "largest_magnitude",
      [](const bindings::MatrixArgument& x, int threads) {
        const py::gil_scoped_release unlocked;
        return largest_magnitude_cpu(bindings::matrix(x, "largest_magnitude"), threads);
      },
      py::arg("x"), py::arg("threads"));

  module.def(
      "task_gram",
      [](const std::vector<bindings::MatrixArgument>& tuned, const std::optional<bindings::MatrixArgument>& base,
         std::uintptr_t mask, std::uintptr_t output, int threads) {
        const py::gil_scoped_release unlocked;
        if (tuned.empty()) throw std::runtime_error("task_gram: no tensors");
        const MatrixView first = bindings::matrix(tuned[0], "task_gram");
        const std::vector<MatrixView> views = bindings::matrices(tuned, first, "task_gram");
        const std::vector<MatrixView> bases = optional_matrix(base, first, "task_gram");
        task_gram_cpu(views.data(), static_cast<int64_t>(views.size()), bases.empty() ? nullptr : &bases[0],
                      bindings::pointer<const uint8_t>(mask), bindings::pointer<double>(output), threads);
      },
      py::arg("tuned"), py::arg("base"), py::arg("mask"), py::arg("output"), py::arg("threads"));

  module.def(
      "task_spread",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned,
         std::uintptr_t output, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "task_spread");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "task_spread");
        task_spread_cpu(base_view, views.data(), static_cast<int64_t>(views.size()), bindings::pointer<double>(output),
                        threads);
      },
      py::arg("base"), py::arg("tuned"), py::arg("output"), py::arg("threads"));

  module.def(
      "add_update",
      [](const bindings::MatrixArgument& base, const bindings::MatrixArgument& update, double alpha,
         std::uintptr_t output, int type, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "add_update");
        const std::vector<MatrixView> views = bindings::matrices({update}, base_view, "add_update");
        add_update_cpu(base_view, views[0], alpha, bindings::pointer<void>(output),
                       bindings::element_type(type, "add_update"), threads);
      },
      py::arg("base"), py::arg("update"), py::arg("alpha"), py::arg("output"), py::arg("type"), py::arg("threads"));

  module.def(
      "spread_mask",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned,
         const std::tuple<double, int64_t>& rule, std::uintptr_t mask, int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "spread_mask");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "spread_mask");
        spread_mask_cpu(base_view, views.data(), static_cast<int64_t>(views.size()), std::get<0>(rule),
                        std::get<1>(rule), bindings::pointer<uint8_t>(mask), threads);
      },
      py::arg("base"), py::arg("tuned"), py::arg("rule"), py::arg("mask"), py::arg("threads"));

  module.def(
      "spread_select",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned,
         const std::function<int64_t(int64_t)>& keep_of, const bindings::MagnitudeSelectAddresses& output,
         int threads) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "spread_select");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "spread_select");
        spread_select_cpu(base_view, views.data(), static_cast<int64_t>(views.size()), keep_of,
                          bindings::magnitude_select_output(output), threads);
      },
      py::arg("base"), py::arg("tuned"), py::arg("keep_of"), py::arg("output"), py::arg("threads"));

  module.def(
      "panel_reflectors",
      [](std::uintptr_t columns, int64_t m, int64_t stride, std::uintptr_t V, std::uintptr_t U, int64_t height,
         int level) {
        const py::gil_scoped_release unlocked;
        panel_reflectors_cpu(bindings::pointer<double>(columns), m, stride, bindings::pointer<double>(V),
                             bindings::pointer<double>(U), height, level);
      },
      py::arg("columns"), py::arg("m"), py::arg("stride"), py::arg("V"), py::arg("U"), py::arg("height"),
      py::arg("level"));

  module.def(
      "chase_bulges",
      [](std::uintptr_t band, int64_t n, std::uintptr_t reflectors, std::uintptr_t factors, int level) {
        const py::gil_scoped_release unlocked;
        chase_bulges_cpu(bindings::pointer<double>(band), n, bindings::pointer<double>(reflectors),
                         bindings::pointer<double>(factors), level);
      },
      py::arg("band"), py::arg("n"), py::arg("reflectors"), py::arg("factors"), py::arg("level"));

  module.def(
      "turn_by_chasing",
      [](std::uintptr_t reflectors, std::uintptr_t factors, std::uintptr_t vectors, int64_t n, int64_t k,
         int64_t stride, int threads, int level) {
        const py::gil_scoped_release unlocked;
        turn_by_chasing_cpu(bindings::pointer<const double>(reflectors), bindings::pointer<const double>(factors),
                            bindings::pointer<double>(vectors), n, k, stride, threads, level);
      },
      py::arg("reflectors"), py::arg("factors"), py::arg("vectors"), py::arg("n"), py::arg("k"), py::arg("stride"),
      py::arg("threads"), py::arg("level"));

  module.def(
      "deflate",
      [](std::uintptr_t values, std::uintptr_t weights, int64_t n, double rho, double tolerance,
         const DeflationAddresses& output) {
        const py::gil_scoped_release unlocked;
        const auto [kept, dropped, pairs, turns, counts] = output;
        deflate_cpu(bindings::pointer<double>(values), bindings::pointer<double>(weights), n, rho, tolerance,
                    Deflation{bindings::pointer<int64_t>(kept), bindings::pointer<int64_t>(dropped),
                              bindings::pointer<int64_t>(pairs), bindings::pointer<double>(turns),
                              bindings::pointer<int64_t>(counts)});
      },
      py::arg("values"), py::arg("weights"), py::arg("n"), py::arg("rho"), py::arg("tolerance"), py::arg("output"));

  module.def(
      "secular_roots",
      [](std::uintptr_t values, std::uintptr_t weights, int64_t n, double rho, const SecularAddresses& output,
         int threads) {
        const py::gil_scoped_release unlocked;
        const auto [origins, offsets, adjusted] = output;
        secular_roots_cpu(bindings::pointer<const double>(values), bindings::pointer<const double>(weights), n, rho,
                          bindings::pointer<int64_t>(origins), bindings::pointer<double>(offsets),
                          bindings::pointer<double>(adjusted), threads);
      },
      py::arg("values"), py::arg("weights"), py::arg("n"), py::arg("rho"), py::arg("output"), py::arg("threads"));

  module.def(
      "secular_vectors",
      [](std::uintptr_t values, const SecularAddresses& found, int64_t n, const WantedArgument& chosen,
         std::uintptr_t vectors, int64_t stride, int threads) {
        const py::gil_scoped_release unlocked;
        const auto [origins, offsets, adjusted] = found;
        const auto [roots, rows, count, columns] = chosen;
        secular_vectors_cpu(bindings::pointer<const double>(values), bindings::pointer<const double>(adjusted),
                            bindings::pointer<const int64_t>(origins), bindings::pointer<const double>(offsets), n,
                            Wanted{bindings::pointer<const int64_t>(roots), bindings::pointer<const int64_t>(rows),
                                   count, bindings::pointer<const int64_t>(columns)},
                            bindings::pointer<double>(vectors), stride, threads);
      },
      py::arg("values"), py::arg("found"), py::arg("n"), py::arg("chosen"), py::arg("vectors"), py::arg("stride"),
      py::arg("threads"));

  module.def(
      "rotate_back",
      [](std::uintptr_t pairs, std::uintptr_t turns, int64_t rotations, std::uintptr_t rows, int64_t count,
         int64_t stride, int threads) {
        const py::gil_scoped_release unlocked;
        rotate_back_cpu(bindings::pointer<const int64_t>(pairs), bindings::pointer<const double>(turns), rotations,
                        bindings::pointer<double>(rows), count, stride, threads);
      },
      py::arg("pairs"), py::arg("turns"), py::arg("rotations"), py::arg("rows"), py::arg("count"), py::arg("stride"),
      py::arg("threads"));

  module.def(
      "philox",
      [](const std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>& counter, uint64_t key) {
        auto [x0, x1, x2, x3] = counter;
        philox(philox_key(key), x0, x1, x2, x3);
        return std::make_tuple(x0, x1, x2, x3);
      },
      py::arg("counter"), py::arg("key"));
}
