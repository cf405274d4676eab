// Python names of the CUDA kernels of products of bits: csrc/cuda/bit_products.h says what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef FASTLOSS_CUDA
#include "cuda/bit_products.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

// (bits, popcounts, rows, columns, weights, offset) of Python.
using PlanesTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, std::vector<int>, int>;

Planes planes_of(const PlanesTuple &t) {
  const auto &[bits, popcounts, rows, columns, weights, offset] = t;
  if (weights.empty() || weights.size() > size_t(kMostPlanes))
    throw py::value_error("planes must be 1 to 4, got " + std::to_string(weights.size()));
  Planes p{pointer<uint8_t>(bits), pointer<int32_t>(popcounts), rows, columns, int(weights.size()), {}, offset};
  std::copy(weights.begin(), weights.end(), p.weights);
  return p;
}

} // namespace
#endif

void bind_bits_cuda([[maybe_unused]] pybind11::module_ &m) {
#ifdef FASTLOSS_CUDA // a launch takes microseconds: the GIL stays
  m.def(
      "bgemm_cuda",
      [](const PlanesTuple &a, const PlanesTuple &b, uintptr_t row_scale, uintptr_t column_scale, uintptr_t bias,
         int activation, int output, uintptr_t out, uintptr_t popcounts, int plan, int device, uintptr_t stream) {
        bgemm_cuda({planes_of(a), planes_of(b), pointer<float>(row_scale), pointer<float>(column_scale),
                    pointer<float>(bias), activation, output, pointer<void>(out), pointer<int32_t>(popcounts)},
                   plan, device, pointer<void>(stream));
      },
      py::kw_only(), py::arg("a"), py::arg("b"), py::arg("row_scale"), py::arg("column_scale"), py::arg("bias"),
      py::arg("activation"), py::arg("output"), py::arg("out"), py::arg("popcounts"), py::arg("plan"),
      py::arg("device"), py::arg("stream"));
  m.def(
      "hamming_topk_splits_cuda",
      [](int64_t rows, int64_t columns, int device) {
        return hamming_topk_splits(rows, columns, device_limits(device));
      },
      py::arg("m"), py::arg("n"), py::arg("device"));
  m.def(
      "hamming_topk_cuda",
      [](const PlanesTuple &a, const PlanesTuple &b, uintptr_t scale, int64_t count, uintptr_t keys, int splits,
         uintptr_t values, uintptr_t index, int plan, int device, uintptr_t stream) {
        hamming_topk_cuda({planes_of(a), planes_of(b), pointer<float>(scale), count, pointer<int64_t>(keys), splits,
                           pointer<void>(values), pointer<int64_t>(index)},
                          plan, device, pointer<void>(stream));
      },
      py::kw_only(), py::arg("a"), py::arg("b"), py::arg("scale"), py::arg("count"), py::arg("keys"), py::arg("splits"),
      py::arg("values"), py::arg("index"), py::arg("plan"), py::arg("device"), py::arg("stream"));
#endif
}
