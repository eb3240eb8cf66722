// How Python passes tensors: plain tuples of integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "r_tsvm/magnitude_select.h"
#include "r_tsvm/reweight_prune.h"
#include "r_tsvm/task_statistics.h"
#include "r_tsvm/tensor_view.h"

namespace r_tsvm::bindings {

// address, rows, cols, row stride in elements, element type code
using MatrixArgument = std::tuple<std::uintptr_t, int64_t, int64_t, int64_t, int>;

// mean, sd, max, zeros, theta, outlier_mass, small
using TaskStatisticsAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                                           std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// threshold, ties, nonfinite
using MagnitudeSelectAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

// tuned, theta, keep, address of the output, address of nonfinite
using PruneArgument = std::tuple<MatrixArgument, double, int64_t, std::uintptr_t, std::uintptr_t>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline ElementType element_type(int code, const char* op) {
  if (code < 0 || code >= kElementTypes) {
    throw std::runtime_error(std::string(op) + ": unknown element type code " + std::to_string(code));
  }
  return static_cast<ElementType>(code);
}

inline MatrixView matrix(const MatrixArgument& argument, const char* op) {
  const auto [address, rows, cols, row_stride, type] = argument;
  if (rows < 0 || cols < 0) throw std::runtime_error(std::string(op) + ": negative size");
  return MatrixView{pointer<const void>(address), rows, cols, row_stride, element_type(type, op)};
}

// Views of the fine-tuned tensors, checked to hold as many elements as the base.
inline std::vector<MatrixView> matrices(const std::vector<MatrixArgument>& arguments, const MatrixView& base,
                                        const char* op) {
  std::vector<MatrixView> views;
  for (const MatrixArgument& argument : arguments) {
    views.push_back(matrix(argument, op));
    if (element_count(views.back()) != element_count(base)) {
      throw std::runtime_error(std::string(op) + ": the tensors differ in size");
    }
  }
  return views;
}

inline TaskStatisticsOutput task_statistics_output(const TaskStatisticsAddresses& addresses) {
  const auto [mean, sd, max, zeros, theta, outlier_mass, small] = addresses;
  return TaskStatisticsOutput{pointer<double>(mean),   pointer<double>(sd),    pointer<double>(max),
                              pointer<int64_t>(zeros), pointer<double>(theta), pointer<double>(outlier_mass),
                              pointer<int64_t>(small)};
}

inline MagnitudeSelectOutput magnitude_select_output(const MagnitudeSelectAddresses& addresses) {
  const auto [threshold, ties, nonfinite] = addresses;
  return MagnitudeSelectOutput{pointer<double>(threshold), pointer<int64_t>(ties), pointer<int64_t>(nonfinite)};
}

inline std::vector<PruneTask> prune_tasks(const std::vector<PruneArgument>& arguments, const MatrixView& base) {
  std::vector<MatrixArgument> tuned;
  for (const PruneArgument& argument : arguments) tuned.push_back(std::get<0>(argument));
  const std::vector<MatrixView> views = matrices(tuned, base, "reweight_prune");
  std::vector<PruneTask> tasks;
  for (const PruneArgument& argument : arguments) {
    const auto& [matrix, theta, keep, output, nonfinite] = argument;
    tasks.push_back(PruneTask{views[tasks.size()], theta, keep, pointer<void>(output), pointer<int64_t>(nonfinite)});
  }
  return tasks;
}

}  // namespace r_tsvm::bindings
