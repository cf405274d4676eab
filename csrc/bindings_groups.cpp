// Python names of the quantisers: csrc/cpu/fake_quant.h and csrc/cpu/quantize_groups.h say what each field is.
#include <pybind11/pybind11.h>

#include "cpu/fake_quant.h"
#include "cpu/quantize_groups.h"
#include "cpu/saved_gradient.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

FakeQuant fake_quant_of(uintptr_t grad, uintptr_t x, uintptr_t scale, uintptr_t offset, uintptr_t zero_point,
                        uintptr_t out, uintptr_t dscale, uintptr_t doffset, int64_t n, int64_t groups, int64_t inner,
                        float low, float high, float steps, float shift, bool rounded, int dtype) {
  return {pointer<void>(grad),
          pointer<void>(x),
          pointer<float>(scale),
          pointer<float>(offset),
          pointer<float>(zero_point),
          pointer<void>(out),
          pointer<float>(dscale),
          pointer<float>(doffset),
          n,
          groups,
          inner,
          low,
          high,
          steps,
          shift,
          rounded,
          dtype};
}

QuantizeGroups quantize_groups_of(uintptr_t x, uintptr_t low, uintptr_t high, uintptr_t seed, uintptr_t codes,
                                  uintptr_t lows, uintptr_t steps, int64_t n, int64_t group, int64_t channels, int bits,
                                  int dtype) {
  return {pointer<void>(x),
          pointer<float>(low),
          pointer<float>(high),
          pointer<int64_t>(seed),
          pointer<uint8_t>(codes),
          pointer<float>(lows),
          pointer<float>(steps),
          n,
          group,
          channels,
          bits,
          dtype};
}

DequantizeGroups dequantize_groups_of(uintptr_t codes, uintptr_t lows, uintptr_t steps, uintptr_t x, int64_t n,
                                      int64_t group, int bits, int dtype) {
  return {
      pointer<uint8_t>(codes), pointer<float>(lows), pointer<float>(steps), pointer<void>(x), n, group, bits, dtype};
}

SavedGradient saved_gradient_of(uintptr_t codes, uintptr_t lows, uintptr_t steps, uintptr_t grad, uintptr_t out,
                                int64_t n, int64_t group, int64_t columns, int bits, int function, int dtype) {
  return {pointer<uint8_t>(codes),
          pointer<float>(lows),
          pointer<float>(steps),
          pointer<void>(grad),
          pointer<void>(out),
          n,
          group,
          columns,
          bits,
          function,
          dtype};
}

} // namespace

void bind_groups(py::module_ &m) {
  py::class_<FakeQuant>(m, "FakeQuant")
      .def(py::init(&fake_quant_of), py::kw_only(), py::arg("grad"), py::arg("x"), py::arg("scale"), py::arg("offset"),
           py::arg("zero_point"), py::arg("out"), py::arg("dscale"), py::arg("doffset"), py::arg("n"),
           py::arg("groups"), py::arg("inner"), py::arg("low"), py::arg("high"), py::arg("steps"), py::arg("shift"),
           py::arg("rounded"), py::arg("dtype"));
  m.def("fake_quant_cpu", &fake_quant_cpu, py::arg("args"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
  py::class_<QuantizeGroups>(m, "QuantizeGroups")
      .def(py::init(&quantize_groups_of), py::kw_only(), py::arg("x"), py::arg("low"), py::arg("high"), py::arg("seed"),
           py::arg("codes"), py::arg("lows"), py::arg("steps"), py::arg("n"), py::arg("group"), py::arg("channels"),
           py::arg("bits"), py::arg("dtype"));
  py::class_<DequantizeGroups>(m, "DequantizeGroups")
      .def(py::init(&dequantize_groups_of), py::kw_only(), py::arg("codes"), py::arg("lows"), py::arg("steps"),
           py::arg("x"), py::arg("n"), py::arg("group"), py::arg("bits"), py::arg("dtype"));
  m.def("quantize_groups_cpu", &quantize_groups_cpu, py::arg("args"), py::arg("isa"),
        py::call_guard<py::gil_scoped_release>());
  m.def("dequantize_groups_cpu", &dequantize_groups_cpu, py::arg("args"), py::arg("isa"),
        py::call_guard<py::gil_scoped_release>());
  py::class_<SavedGradient>(m, "SavedGradient")
      .def(py::init(&saved_gradient_of), py::kw_only(), py::arg("codes"), py::arg("lows"), py::arg("steps"),
           py::arg("grad"), py::arg("out"), py::arg("n"), py::arg("group"), py::arg("columns"), py::arg("bits"),
           py::arg("function"), py::arg("dtype"));
  m.def("saved_gradient_cpu", &saved_gradient_cpu, py::arg("args"), py::arg("isa"),
        py::call_guard<py::gil_scoped_release>());
}
