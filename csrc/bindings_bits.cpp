// Python names of the products of bits: csrc/cpu/bgemm.h and csrc/cpu/hamming_topk.h say what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bgemm.h"
#include "cpu/hamming_topk.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

Planes planes_of(uintptr_t bits, uintptr_t popcounts, int64_t rows, int64_t columns, const std::vector<int> &weights,
                 int offset) {
  if (weights.empty() || weights.size() > size_t(kMostPlanes))
    throw std::invalid_argument("planes must be 1 to " + std::to_string(kMostPlanes) + ", got " +
                                std::to_string(weights.size()));
  Planes planes = {pointer<uint8_t>(bits), pointer<int32_t>(popcounts), rows, columns, int(weights.size()), {}, offset};
  for (size_t p = 0; p < weights.size(); ++p) planes.weights[p] = weights[p];
  return planes;
}

} // namespace

void bind_bits(py::module_ &m) {
  py::class_<Planes>(m, "Planes")
      .def(py::init(&planes_of), py::kw_only(), py::arg("bits"), py::arg("popcounts"), py::arg("rows"),
           py::arg("columns"), py::arg("weights"), py::arg("offset"));
  m.def("has_bit_engine", &has_bit_engine, py::arg("engine"));
  m.def(
      "bgemm_cpu",
      [](const Planes &a, const Planes &b, uintptr_t row_scale, uintptr_t column_scale, uintptr_t bias, int activation,
         int output, uintptr_t y, uintptr_t popcounts, bool stream, int isa, int engine) {
        const Bgemm args = {
            a,          b,      pointer<float>(row_scale), pointer<float>(column_scale), pointer<float>(bias),
            activation, output, pointer<void>(y),          pointer<int32_t>(popcounts),  stream};
        py::gil_scoped_release release;
        bgemm_cpu(args, isa, engine);
      },
      py::kw_only(), py::arg("a"), py::arg("b"), py::arg("row_scale"), py::arg("column_scale"), py::arg("bias"),
      py::arg("activation"), py::arg("output"), py::arg("y"), py::arg("popcounts"), py::arg("stream"), py::arg("isa"),
      py::arg("engine"));
  m.def(
      "hamming_topk_cpu",
      [](const Planes &queries, const Planes &database, uintptr_t scale, int64_t count, uintptr_t values,
         uintptr_t index, int isa, int engine) {
        const HammingTopk args = {
            queries, database, pointer<float>(scale), count, pointer<void>(values), pointer<int64_t>(index)};
        py::gil_scoped_release release;
        hamming_topk_cpu(args, isa, engine);
      },
      py::kw_only(), py::arg("queries"), py::arg("database"), py::arg("scale"), py::arg("count"), py::arg("values"),
      py::arg("index"), py::arg("isa"), py::arg("engine"));
}
