#include "arguments.h"

namespace py = pybind11;
using namespace r_tsvm;

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
}
