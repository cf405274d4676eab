// Python names of the kernels along a list of edges: csrc/pair_stats.h says what each field is.
#include <pybind11/pybind11.h>

#include "cpu/edge_dot.h"
#ifdef FASTLOSS_CUDA
#include "cuda/cuda.h"
#endif

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

EdgeDot edge_dot_of(uintptr_t q, uintptr_t k, int64_t m, int64_t n, int64_t d, int64_t ldq, int64_t ldk, int64_t edges,
                    uintptr_t rows, uintptr_t columns, uintptr_t dots, int dtype) {
  return {pointer<void>(q),          pointer<void>(k),     m,    n, d, ldq, ldk, edges, pointer<int64_t>(rows),
          pointer<int64_t>(columns), pointer<float>(dots), dtype};
}

EdgeSum edge_sum_of(uintptr_t x, uintptr_t weight, uintptr_t row_pointer, uintptr_t source, uintptr_t sums, int64_t m,
                    int64_t n, int64_t d, int64_t ldx, int64_t edges, int dtype) {
  return {pointer<void>(x),
          pointer<float>(weight),
          pointer<int64_t>(row_pointer),
          pointer<int64_t>(source),
          pointer<void>(sums),
          m,
          n,
          d,
          ldx,
          edges,
          dtype};
}

} // namespace

void bind_edges(py::module_ &m) {
  py::class_<EdgeDot>(m, "EdgeDot")
      .def(py::init(&edge_dot_of), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("m"), py::arg("n"), py::arg("d"),
           py::arg("ldq"), py::arg("ldk"), py::arg("edges"), py::arg("rows"), py::arg("columns"), py::arg("dots"),
           py::arg("dtype"));
  py::class_<EdgeSum>(m, "EdgeSum")
      .def(py::init(&edge_sum_of), py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("pointer"),
           py::arg("source"), py::arg("sums"), py::arg("m"), py::arg("n"), py::arg("d"), py::arg("ldx"),
           py::arg("edges"), py::arg("dtype"));
  m.def("edge_dot_cpu", &edge_dot_cpu, py::arg("args"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  m.def("edge_sum_cpu", &edge_sum_cpu, py::arg("args"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
#ifdef FASTLOSS_CUDA // a launch takes microseconds: the GIL stays
  m.def(
      "edge_dot_cuda",
      [](const EdgeDot &args, int device, uintptr_t stream) { edge_dot_cuda(args, device, pointer<void>(stream)); },
      py::arg("args"), py::arg("device"), py::arg("stream"));
  m.def(
      "edge_sum_cuda",
      [](const EdgeSum &args, int device, uintptr_t stream) { edge_sum_cuda(args, device, pointer<void>(stream)); },
      py::arg("args"), py::arg("device"), py::arg("stream"));
#endif
}
