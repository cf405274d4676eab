// Python names of the pair kernels. A Pairing holds addresses: what they belong to must outlive the call.
#include "bindings_pairs.h"

#include <array>

#include "cpu/pair_stats.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

PairClass class_of(uintptr_t rows, uintptr_t columns, const std::vector<int64_t> &diagonals) {
  PairClass set = {pointer<int32_t>(rows), pointer<int32_t>(columns), int(diagonals.size()), {0, 0}};
  if (diagonals.size() > 2) throw py::value_error("a class takes two diagonals at most");
  std::copy(diagonals.begin(), diagonals.end(), set.diagonals);
  return set;
}

Pairing pairing_of(uintptr_t q, uintptr_t k, int64_t m, int64_t n, int64_t d, int64_t ldq, int64_t ldk, int dtype,
                   uintptr_t row_scale, uintptr_t column_scale, uintptr_t row_valid, uintptr_t column_valid,
                   uintptr_t positive_rows, uintptr_t positive_columns, const std::vector<int64_t> &positive_diagonals,
                   uintptr_t excluded_rows, uintptr_t excluded_columns, const std::vector<int64_t> &excluded_diagonals,
                   uintptr_t low, uintptr_t high, uintptr_t guide_q, uintptr_t guide_k, int64_t guide_d,
                   int64_t ld_guide_q, int64_t ld_guide_k, int guide_dtype, uintptr_t guide_limit) {
  return {pointer<void>(q),
          pointer<void>(k),
          m,
          n,
          d,
          ldq,
          ldk,
          dtype,
          pointer<float>(row_scale),
          pointer<float>(column_scale),
          pointer<uint8_t>(row_valid),
          pointer<uint8_t>(column_valid),
          class_of(positive_rows, positive_columns, positive_diagonals),
          class_of(excluded_rows, excluded_columns, excluded_diagonals),
          pointer<float>(low),
          pointer<float>(high),
          pointer<void>(guide_q),
          pointer<void>(guide_k),
          guide_d,
          ld_guide_q,
          ld_guide_k,
          guide_dtype,
          pointer<float>(guide_limit)};
}

// Addresses of dq, dk, drow_scale, dcolumn_scale; 0: not needed.
PairGradients gradients_of(const std::array<uintptr_t, 4> &to) {
  return {pointer<void>(to[0]), pointer<void>(to[1]), pointer<float>(to[2]), pointer<float>(to[3])};
}

} // namespace

void bind_pairs(py::module_ &m) {
  py::class_<Pairing>(m, "Pairing")
      .def(py::init(&pairing_of), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("m"), py::arg("n"), py::arg("d"),
           py::arg("ldq"), py::arg("ldk"), py::arg("dtype"), py::arg("row_scale"), py::arg("column_scale"),
           py::arg("row_valid"), py::arg("column_valid"), py::arg("positive_rows"), py::arg("positive_columns"),
           py::arg("positive_diagonals"), py::arg("excluded_rows"), py::arg("excluded_columns"),
           py::arg("excluded_diagonals"), py::arg("low"), py::arg("high"), py::arg("guide_q"), py::arg("guide_k"),
           py::arg("guide_d"), py::arg("ld_guide_q"), py::arg("ld_guide_k"), py::arg("guide_dtype"),
           py::arg("guide_limit"));
  m.def("pair_kept_floats", &pair_kept_floats, py::arg("m"), py::arg("n"));
  m.def(
      "pair_stats_cpu",
      [](const Pairing &pairing, uintptr_t boost, uintptr_t margin, int want, float second, uintptr_t rows,
         uintptr_t columns, uintptr_t row_grad, uintptr_t column_grad, const std::array<uintptr_t, 4> &gradients,
         uintptr_t kept, int64_t keep, int isa) {
        const PairStats args = {pairing,
                                pointer<float>(boost),
                                pointer<float>(margin),
                                want,
                                second,
                                pointer<float>(rows),
                                pointer<float>(columns),
                                pointer<float>(row_grad),
                                pointer<float>(column_grad),
                                gradients_of(gradients),
                                pointer<float>(kept),
                                keep};
        py::gil_scoped_release release;
        pair_stats_cpu(args, isa);
      },
      py::kw_only(), py::arg("pairing"), py::arg("boost"), py::arg("margin"), py::arg("want"), py::arg("second"),
      py::arg("rows"), py::arg("columns"), py::arg("row_grad") = 0, py::arg("column_grad") = 0,
      py::arg("gradients") = std::array<uintptr_t, 4>{}, py::arg("kept"), py::arg("keep"), py::arg("isa"));
}
