// Python names of pair_map, pair_histogram and row_topk: csrc/pair_stats.h says what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/pair_histogram.h"
#include "cpu/pair_map.h"
#include "cpu/row_topk.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *address(uintptr_t value) { return reinterpret_cast<T *>(value); }

// Addresses of dq, dk, drow_scale, dcolumn_scale; 0: not needed.
using Addresses = std::array<uintptr_t, 4>;
PairGradients gradients_of(const Addresses &to) {
  return {address<void>(to[0]), address<void>(to[1]), address<float>(to[2]), address<float>(to[3])};
}

} // namespace

void bind_pair_maps(py::module_ &m) {
  m.def(
      "pair_map_cpu",
      [](const Pairing &pairing, uintptr_t neg_threshold, uintptr_t pos_threshold, int function, uintptr_t table,
         uintptr_t grad, const Addresses &gradients, int isa) {
        const PairMap args = {pairing,
                              address<float>(neg_threshold),
                              address<float>(pos_threshold),
                              function,
                              address<float>(table),
                              address<float>(grad),
                              gradients_of(gradients)};
        py::gil_scoped_release release;
        pair_map_cpu(args, isa);
      },
      py::kw_only(), py::arg("pairing"), py::arg("neg_threshold"), py::arg("pos_threshold"), py::arg("function"),
      py::arg("table"), py::arg("grad"), py::arg("gradients"), py::arg("isa"));
  m.def(
      "pair_histogram_cpu",
      [](const Pairing &pairing, int64_t bins, double first, double step, uintptr_t table, uintptr_t grad,
         const Addresses &gradients, int isa) {
        const PairHistogram args = {
            pairing, bins, first, step, address<float>(table), address<float>(grad), gradients_of(gradients)};
        py::gil_scoped_release release;
        pair_histogram_cpu(args, isa);
      },
      py::kw_only(), py::arg("pairing"), py::arg("bins"), py::arg("first"), py::arg("step"), py::arg("table"),
      py::arg("grad"), py::arg("gradients"), py::arg("isa"));
  m.def(
      "row_topk_cpu",
      [](const Pairing &pairing, int64_t count, int classes, uintptr_t values, uintptr_t columns, int isa) {
        const RowTopk args = {pairing, count, classes, address<float>(values), address<int64_t>(columns)};
        py::gil_scoped_release release;
        row_topk_cpu(args, isa);
      },
      py::kw_only(), py::arg("pairing"), py::arg("count"), py::arg("classes"), py::arg("values"), py::arg("columns"),
      py::arg("isa"));
}
