// Python names of hash_attention: csrc/cpu/hash_attention.h says what each field is.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/hash_attention.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

// (address, address of the scales, width) of Python.
TokenRows rows_of(const std::tuple<uintptr_t, uintptr_t, int64_t> &t) {
  return {pointer<void>(std::get<0>(t)), pointer<float>(std::get<1>(t)), std::get<2>(t)};
}

using Given = std::tuple<uintptr_t, uintptr_t, int64_t>;

void hash_attention(const Given &x, const Given &w, const Given &z, uintptr_t alpha, uintptr_t beta,
                    float alpha_constant, float own, uintptr_t d, float bias, uintptr_t y, int64_t groups,
                    int64_t queries, int64_t keys, int direction, int dtype, int isa) {
  const HashAttention args{rows_of(x),
                           rows_of(w),
                           rows_of(z),
                           pointer<float>(alpha),
                           pointer<float>(beta),
                           alpha_constant,
                           own,
                           pointer<float>(d),
                           bias,
                           pointer<void>(y),
                           groups,
                           queries,
                           keys,
                           direction,
                           dtype};
  py::gil_scoped_release free;
  hash_attention_cpu(args, isa);
}

void hash_slopes(uintptr_t grad, uintptr_t out, uintptr_t d, uintptr_t inverse, uintptr_t slope, int64_t tokens,
                 int64_t width, int dtype, int isa) {
  const HashSlopes args{pointer<void>(grad),
                        pointer<void>(out),
                        pointer<float>(d),
                        pointer<float>(inverse),
                        pointer<float>(slope),
                        tokens,
                        width,
                        dtype};
  py::gil_scoped_release free;
  hash_slopes_cpu(args, isa);
}

} // namespace

void bind_hash(py::module_ &m) {
  using py::arg, py::kw_only;
  m.def("hash_attention_cpu", &hash_attention, kw_only(), arg("x"), arg("w"), arg("z"), arg("alpha"), arg("beta"),
        arg("alpha_constant"), arg("own"), arg("d"), arg("bias"), arg("y"), arg("groups"), arg("queries"), arg("keys"),
        arg("direction"), arg("dtype"), arg("isa"));
  m.def("hash_slopes_cpu", &hash_slopes, kw_only(), arg("grad"), arg("out"), arg("d"), arg("inverse"), arg("slope"),
        arg("tokens"), arg("width"), arg("dtype"), arg("isa"));
}
