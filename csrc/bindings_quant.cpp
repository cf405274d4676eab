// Python names of the bit kernels: csrc/cpu/pack_bits.h and csrc/cpu/binarize.h say what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/binarize.h"
#include "cpu/pack_bits.h"

#include <tuple>
#include <vector>

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

// (address, count) of Python.
Parameter parameter_of(const std::tuple<uintptr_t, int64_t> &t) {
  return {pointer<float>(std::get<0>(t)), std::get<1>(t)};
}

void pack_bits_of(uintptr_t x, uintptr_t center, uintptr_t scale, int64_t center_rows, int64_t scale_rows, int64_t rows,
                  int64_t columns, int64_t group, int dtype, int kind, int low, int planes, uintptr_t bits,
                  uintptr_t popcounts, int isa) {
  const PackBits args = {pointer<void>(x),
                         pointer<float>(center),
                         pointer<float>(scale),
                         center_rows,
                         scale_rows,
                         rows,
                         columns,
                         group,
                         dtype,
                         kind,
                         low,
                         planes,
                         pointer<uint8_t>(bits),
                         pointer<int32_t>(popcounts)};
  py::gil_scoped_release release;
  pack_bits_cpu(args, isa);
}

void unpack_bits_of(uintptr_t bits, int64_t rows, int64_t columns, const std::vector<int> &weights, int offset,
                    uintptr_t scale, int64_t scale_rows, int64_t group, int dtype, uintptr_t x, int isa) {
  UnpackBits args = {};
  args.planes = {pointer<uint8_t>(bits), nullptr, rows, columns, int(weights.size()), {}, offset};
  for (size_t p = 0; p < weights.size() && p < kMostPlanes; ++p) args.planes.weights[p] = weights[p];
  args.scale = pointer<float>(scale), args.scale_rows = scale_rows, args.group = group;
  args.dtype = dtype, args.x = pointer<void>(x);
  py::gil_scoped_release release;
  unpack_bits_cpu(args, isa);
}

void binarize_of(uintptr_t x, const std::tuple<uintptr_t, int64_t> &shift, const std::tuple<uintptr_t, int64_t> &scale,
                 int64_t rows, int64_t columns, int64_t groups, int64_t inner, int dtype, int surrogate, double p0,
                 double p1, uintptr_t y, uintptr_t signs, uintptr_t popcounts, uintptr_t mask, uintptr_t codes,
                 int isa) {
  Binarize args = {};
  args.x = pointer<void>(x), args.shift = parameter_of(shift), args.scale = parameter_of(scale);
  args.rows = rows, args.columns = columns, args.groups = groups, args.inner = inner, args.dtype = dtype;
  args.surrogate = surrogate, args.p0 = p0, args.p1 = p1;
  args.y = pointer<void>(y), args.signs = pointer<uint8_t>(signs), args.popcounts = pointer<int32_t>(popcounts);
  args.mask = pointer<uint8_t>(mask), args.codes = pointer<uint8_t>(codes);
  py::gil_scoped_release release;
  binarize_cpu(args, isa);
}

void binarize_backward_of(uintptr_t grad, uintptr_t x, uintptr_t signs, uintptr_t mask, uintptr_t codes,
                          const std::tuple<uintptr_t, int64_t> &shift, const std::tuple<uintptr_t, int64_t> &scale,
                          int64_t rows, int64_t columns, int64_t groups, int64_t inner, int dtype, int surrogate,
                          double p0, double p1, uintptr_t dx, uintptr_t dscale, uintptr_t dshift, int isa) {
  BinarizeBackward args = {};
  args.grad = pointer<void>(grad), args.x = pointer<void>(x), args.signs = pointer<uint8_t>(signs);
  args.mask = pointer<uint8_t>(mask), args.codes = pointer<uint8_t>(codes);
  args.shift = parameter_of(shift), args.scale = parameter_of(scale);
  args.rows = rows, args.columns = columns, args.groups = groups, args.inner = inner, args.dtype = dtype;
  args.surrogate = surrogate, args.p0 = p0, args.p1 = p1;
  args.dx = pointer<void>(dx), args.dscale = pointer<float>(dscale), args.dshift = pointer<float>(dshift);
  py::gil_scoped_release release;
  binarize_backward_cpu(args, isa);
}

} // namespace

void bind_quant(py::module_ &m) {
  using py::arg, py::kw_only;
  m.def("pack_bits_cpu", &pack_bits_of, kw_only(), arg("x"), arg("center"), arg("scale"), arg("center_rows"),
        arg("scale_rows"), arg("rows"), arg("columns"), arg("group"), arg("dtype"), arg("kind"), arg("low"),
        arg("planes"), arg("bits"), arg("popcounts"), arg("isa"));
  m.def("unpack_bits_cpu", &unpack_bits_of, kw_only(), arg("bits"), arg("rows"), arg("columns"), arg("weights"),
        arg("offset"), arg("scale"), arg("scale_rows"), arg("group"), arg("dtype"), arg("x"), arg("isa"));
  m.def("binarize_cpu", &binarize_of, kw_only(), arg("x"), arg("shift"), arg("scale"), arg("rows"), arg("columns"),
        arg("groups"), arg("inner"), arg("dtype"), arg("surrogate"), arg("p0"), arg("p1"), arg("y"), arg("signs"),
        arg("popcounts"), arg("mask"), arg("codes"), arg("isa"));
  m.def("binarize_backward_cpu", &binarize_backward_of, kw_only(), arg("grad"), arg("x"), arg("signs"), arg("mask"),
        arg("codes"), arg("shift"), arg("scale"), arg("rows"), arg("columns"), arg("groups"), arg("inner"),
        arg("dtype"), arg("surrogate"), arg("p0"), arg("p1"), arg("dx"), arg("dscale"), arg("dshift"), arg("isa"));
}
