#include "arguments.h"

namespace py = pybind11;
using namespace r_tsvm;

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "CUDA kernels. Addresses in, work queued on the given stream; the caller checks shapes.";

  module.def("task_statistics_workspace", &task_statistics_cuda_workspace, py::arg("elements"), py::arg("tasks"));

  module.def(
      "task_statistics",
      [](const bindings::MatrixArgument& base, const std::vector<bindings::MatrixArgument>& tuned, double sigma,
         double eps, const bindings::TaskStatisticsAddresses& output, std::uintptr_t workspace, int device,
         std::uintptr_t stream) {
        const py::gil_scoped_release unlocked;
        const MatrixView base_view = bindings::matrix(base, "task_statistics");
        const std::vector<MatrixView> views = bindings::matrices(tuned, base_view, "task_statistics");
        task_statistics_cuda(base_view, views.data(), static_cast<int64_t>(views.size()), sigma, eps,
                             bindings::task_statistics_output(output), bindings::pointer<void>(workspace), device,
                             bindings::pointer<void>(stream));
      },
      py::arg("base"), py::arg("tuned"), py::arg("sigma"), py::arg("eps"), py::arg("output"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
}
