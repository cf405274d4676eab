// Python names of pair_map, pair_histogram and row_topk: csrc/pair_stats.h says what each field is.
#include <pybind11/pybind11.h>

#include "cpu/pair_histogram.h"
#include "cpu/pair_map.h"
#include "cpu/row_topk.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

// The fields of a Pairing by name, as pairs/compiled_pairing.py makes them.
class Fields {
public:
  explicit Fields(const py::dict &fields) : fields(fields) {}
  int64_t number(const char *name) const { return fields[name].cast<int64_t>(); }
  template <class T> T *pointer(const char *name) const {
    return reinterpret_cast<T *>(fields[name].cast<uintptr_t>());
  }
  PairClass members(const char *rows, const char *columns, const char *diagonals) const {
    PairClass set = {pointer<int32_t>(rows), pointer<int32_t>(columns), 0, {}};
    for (const py::handle &one : fields[diagonals].cast<py::tuple>())
      if (set.num_diagonals < 2) set.diagonals[set.num_diagonals++] = one.cast<int64_t>();
    return set;
  }

private:
  const py::dict &fields;
};

Pairing pairing_of(const py::dict &dict) {
  const Fields f(dict);
  return {f.pointer<void>("q"),
          f.pointer<void>("k"),
          f.number("m"),
          f.number("n"),
          f.number("d"),
          f.number("ldq"),
          f.number("ldk"),
          int(f.number("dtype")),
          f.pointer<float>("row_scale"),
          f.pointer<float>("column_scale"),
          f.pointer<uint8_t>("row_valid"),
          f.pointer<uint8_t>("column_valid"),
          f.members("positive_rows", "positive_columns", "positive_diagonals"),
          f.members("excluded_rows", "excluded_columns", "excluded_diagonals"),
          f.pointer<float>("low"),
          f.pointer<float>("high"),
          f.pointer<void>("guide_q"),
          f.pointer<void>("guide_k"),
          f.number("guide_d"),
          f.number("ld_guide_q"),
          f.number("ld_guide_k"),
          int(f.number("guide_dtype")),
          f.pointer<float>("guide_limit")};
}

template <class T> T *address(uintptr_t value) { return reinterpret_cast<T *>(value); }

PairGradients gradients_of(const py::tuple &addresses) {
  const auto at = [&](size_t i) { return addresses[i].cast<uintptr_t>(); };
  return {address<void>(at(0)), address<void>(at(1)), address<float>(at(2)), address<float>(at(3))};
}

} // namespace

void bind_pair_maps(py::module_ &m) {
  m.def(
      "pair_map_cpu",
      [](const py::dict &pairing, uintptr_t neg_threshold, uintptr_t pos_threshold, int function, uintptr_t table,
         uintptr_t grad, const py::tuple &gradients, int isa) {
        const PairMap args = {pairing_of(pairing), address<float>(neg_threshold), address<float>(pos_threshold),
                              function,            address<float>(table),         address<float>(grad),
                              gradients_of(gradients)};
        py::gil_scoped_release release;
        pair_map_cpu(args, isa);
      },
      py::arg("pairing"), py::kw_only(), py::arg("neg_threshold"), py::arg("pos_threshold"), py::arg("function"),
      py::arg("table"), py::arg("grad"), py::arg("gradients"), py::arg("isa"));
  m.def(
      "pair_histogram_cpu",
      [](const py::dict &pairing, int64_t bins, float first, float step, uintptr_t table, uintptr_t grad,
         const py::tuple &gradients, int isa) {
        const PairHistogram args = {pairing_of(pairing),   bins, first, step, address<float>(table),
                                    address<float>(grad), gradients_of(gradients)};
        py::gil_scoped_release release;
        pair_histogram_cpu(args, isa);
      },
      py::arg("pairing"), py::kw_only(), py::arg("bins"), py::arg("first"), py::arg("step"), py::arg("table"),
      py::arg("grad"), py::arg("gradients"), py::arg("isa"));
  m.def(
      "row_topk_cpu",
      [](const py::dict &pairing, int64_t count, int classes, uintptr_t values, uintptr_t columns, int isa) {
        const RowTopk args = {pairing_of(pairing), count, classes, address<float>(values), address<int64_t>(columns)};
        py::gil_scoped_release release;
        row_topk_cpu(args, isa);
      },
      py::arg("pairing"), py::kw_only(), py::arg("count"), py::arg("classes"), py::arg("values"), py::arg("columns"),
      py::arg("isa"));
}
