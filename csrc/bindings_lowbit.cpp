// Python names of lowbit_matmul: csrc/cpu/lowbit_matmul.h says what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/lowbit_matmul.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

void lowbit_matmul(uintptr_t x, uintptr_t planes, uintptr_t scale, uintptr_t x_scale, uintptr_t bias, uintptr_t y,
                   int64_t m, int64_t ldx, int64_t rows, int64_t columns, const std::vector<int> &weights, int offset,
                   int64_t scale_rows, int64_t groups, int64_t group, bool transposed, int x_dtype, int y_dtype,
                   int isa) {
  if (weights.empty() || weights.size() > size_t(kMostPlanes)) throw std::invalid_argument("1 to 4 planes");
  Planes w{pointer<uint8_t>(planes), nullptr, rows, columns, int(weights.size()), {}, offset};
  std::copy(weights.begin(), weights.end(), w.weights);
  const LowbitMatmul args{pointer<void>(x),
                          w,
                          pointer<float>(scale),
                          pointer<float>(x_scale),
                          pointer<float>(bias),
                          pointer<void>(y),
                          m,
                          ldx,
                          scale_rows,
                          groups,
                          group,
                          transposed,
                          x_dtype,
                          y_dtype};
  py::gil_scoped_release free;
  lowbit_matmul_cpu(args, isa);
}

} // namespace

void bind_lowbit(py::module_ &m) {
  m.def("lowbit_matmul_cpu", &lowbit_matmul, py::kw_only(), py::arg("x"), py::arg("planes"), py::arg("scale"),
        py::arg("x_scale"), py::arg("bias"), py::arg("y"), py::arg("m"), py::arg("ldx"), py::arg("rows"),
        py::arg("columns"), py::arg("weights"), py::arg("offset"), py::arg("scale_rows"), py::arg("groups"),
        py::arg("group"), py::arg("transposed"), py::arg("x_dtype"), py::arg("y_dtype"), py::arg("isa"));
}
