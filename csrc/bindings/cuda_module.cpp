#include "arguments.h"
#include "r_tsvm/elect_and_sum.h"
#include "r_tsvm/magnitude_ranks.h"

namespace py = pybind11;
using namespace r_tsvm;

namespace {

// tuned, address of theta or 0, keep, address of the output, index of the selection or -1
using PruneArgument = std::tuple<bindings::MatrixArgument, std::uintptr_t, int64_t, std::uintptr_t, int>;

// threshold, ties, tied, nonfinite
using PruneAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// threshold, seed, substream, index of the first element
using RandomMaskArgument = std::tuple<uint64_t, uint64_t, uint32_t, uint64_t>;

// weight, factor; indices of what is kept and of what is dropped again, or -1; random mask; addresses of ranks,
// thresholds and factors, or 0; address of a mask, or 0
using ElectTaskArgument = std::tuple<double, double, int, int, RandomMaskArgument,
                                     std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>, std::uintptr_t>;

std::vector<PruneTaskCuda> prune_tasks(const std::vector<PruneArgument>& arguments) {
  std::vector<PruneTaskCuda> tasks;
  for (const auto& [tuned, theta, keep, output, selection] : arguments) {
    tasks.push_back(PruneTaskCuda{bindings::matrix(tuned, "reweight_prune"), bindings::pointer<const double>(theta),
                                  keep, bindings::pointer<void>(output), selection});
    if (element_count(tasks.back().tuned) != element_count(tasks.front().tuned)) {
      throw std::runtime_error("reweight_prune: the tensors differ in size");
    }
  }
  return tasks;
}

PruneSelections prune_selections(const PruneAddresses& addresses) {
  const auto [threshold, ties, tied, nonfinite] = addresses;
  return PruneSelections{bindings::pointer<double>(threshold), bindings::pointer<int64_t>(ties),
                         bindings::pointer<int64_t>(tied), bindings::pointer<int64_t>(nonfinite)};
}

// The view of a base that may be missing, checked to hold as many elements as `other`.
std::vector<MatrixView> optional_base(const std::optional<bindings::MatrixArgument>& base, const MatrixView& other,
                                      const char* op) {
  return bindings::matrices(base ? std::vector{*base} : std::vector<bindings::MatrixArgument>{}, other, op);
}

RandomMask random_mask(const RandomMaskArgument& argument) {
  const auto [threshold, seed, substream, first] = argument;
  return RandomMask{threshold, seed, substream, first};
}

ElectTaskCuda elect_task(const ElectTaskArgument& argument) {
  const auto& [weight, factor, kept, dropped, sampled, ranked, mask] = argument;
  const auto [ranks, thresholds, factors] = ranked;
  return ElectTaskCuda{
      weight,
      factor,
      kept,
      dropped,
      random_mask(sampled),
      RankedSelection{bindings::pointer<const int32_t>(ranks), bindings::pointer<const int64_t>(thresholds),
                      bindings::pointer<const double>(factors)},
      bindings::pointer<const uint8_t>(mask)};
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "CUDA kernels. Addresses in, work queued on the given stream; the caller checks shapes.";

  module.def("magnitude_select_workspace", &magnitude_select_cuda_workspace);

  module.def(
      "magnitude_select",
      [](const bindings::MatrixArgument& x, const std::optional<bindings::MatrixArgument>& base,
         const std::vector<int64_t>& keep, const bindings::MagnitudeSelectAddresses& output, std::uintptr_t workspace,
         int device, std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const MatrixView view = bindings::matrix(x, "magnitude_select");
        const std::vector<MatrixView> bases = optional_base(base, view, "magnitude_select");
        magnitude_select_cuda(view, bases.empty() ? nullptr : &bases[0], keep.data(), static_cast<int64_t>(keep.size()),
                              bindings::magnitude_select_output(output), bindings::pointer<void>(workspace), device,
                              bindings::pointer<void>(stream));
      },
      py::arg("x"), py::arg("base"), py::arg("keep"), py::arg("output"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"));

  module.def("magnitude_ranks_workspace", &magnitude_ranks_cuda_workspace, py::arg("rows"), py::arg("cols"),
             py::arg("in_float64"), py::arg("device"));

  module.def(
      "magnitude_ranks",
      [](const bindings::MatrixArgument& x, const std::optional<bindings::MatrixArgument>& base, int64_t cols,
         std::uintptr_t ranks, std::uintptr_t nonfinite, std::uintptr_t workspace, int device, std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const MatrixView view = bindings::matrix(x, "magnitude_ranks");
        const std::vector<MatrixView> bases = optional_base(base, view, "magnitude_ranks");
        magnitude_ranks_cuda(
            view, bases.empty() ? nullptr : &bases[0], cols,
            MagnitudeRanksOutput{bindings::pointer<int32_t>(ranks), bindings::pointer<int64_t>(nonfinite)},
            bindings::pointer<void>(workspace), device, bindings::pointer<void>(stream));
      },
      py::arg("x"), py::arg("base"), py::arg("cols"), py::arg("ranks"), py::arg("nonfinite"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));

  module.def("reweight_prune_workspace", &reweight_prune_cuda_workspace, py::arg("elements"), py::arg("selections"));

  module.def(
      "reweight_prune_select",
      [](const bindings::MatrixArgument& base, const std::vector<PruneArgument>& tasks, bool in_float64,
         const PruneAddresses& selections, std::uintptr_t workspace, int device, std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const std::vector<PruneTaskCuda> views = prune_tasks(tasks);
        if (views.empty()) return;
        const MatrixView base_view = bindings::matrices({base}, views[0].tuned, "reweight_prune")[0];
        reweight_prune_select_cuda(base_view, views.data(), static_cast<int64_t>(views.size()), in_float64,
                                   prune_selections(selections), bindings::pointer<void>(workspace), device,
                                   bindings::pointer<void>(stream));
      },
      py::arg("base"), py::arg("tasks"), py::arg("in_float64"), py::arg("selections"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));

  module.def(
      "reweight_prune_apply",
      [](const bindings::MatrixArgument& base, const std::vector<PruneArgument>& tasks, bool in_float64,
         const PruneAddresses& selections, int64_t selection_count, std::uintptr_t workspace, int device,
         std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const std::vector<PruneTaskCuda> views = prune_tasks(tasks);
        if (views.empty()) return;
        const MatrixView base_view = bindings::matrices({base}, views[0].tuned, "reweight_prune")[0];
        reweight_prune_apply_cuda(base_view, views.data(), static_cast<int64_t>(views.size()), in_float64,
                                  prune_selections(selections), selection_count, bindings::pointer<void>(workspace),
                                  device, bindings::pointer<void>(stream));
      },
      py::arg("base"), py::arg("tasks"), py::arg("in_float64"), py::arg("selections"), py::arg("selection_count"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"));

  module.def("elect_and_sum_workspace", &elect_and_sum_cuda_workspace, py::arg("elements"), py::arg("tasks"),
             py::arg("selections"));

  module.def(
      "elect_and_sum",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned,
         const std::vector<ElectTaskArgument>& tasks, int election, bool normalize, double least, double alpha,
         const std::tuple<std::uintptr_t, std::uintptr_t, int64_t>& selections, std::uintptr_t output, int type,
         std::uintptr_t workspace, int device, std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "elect_and_sum");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "elect_and_sum");
        if (tasks.size() != views.size()) throw std::runtime_error("elect_and_sum: not one task per tensor");
        if (election < 0 || election >= kElections) throw std::runtime_error("elect_and_sum: unknown election code");
        std::vector<ElectTaskCuda> rules;
        for (const ElectTaskArgument& task : tasks) rules.push_back(elect_task(task));
        const auto [threshold, ties, count] = selections;
        elect_and_sum_cuda(
            base_view, views.data(), rules.data(), static_cast<int64_t>(views.size()),
            ElectOptions{static_cast<Election>(election), normalize, least, alpha},
            ElectSelections{bindings::pointer<const double>(threshold), bindings::pointer<const int64_t>(ties), count},
            bindings::pointer<void>(output), bindings::element_type(type, "elect_and_sum"),
            bindings::pointer<void>(workspace), device, bindings::pointer<void>(stream));
      },
      py::arg("base"), py::arg("tuned"), py::arg("tasks"), py::arg("election"), py::arg("normalize"), py::arg("least"),
      py::arg("alpha"), py::arg("selections"), py::arg("output"), py::arg("type"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
}
