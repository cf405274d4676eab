// Python names of the decoders of compressed tensors: csrc/cpu/lossless_decode.h and csrc/cpu/crc32c.h say what each
// argument is. Plans have passed contract.check_plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>

#include "cpu/crc32c.h"
#include "cpu/lossless_decode.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

Compressed compressed_of(uintptr_t blob, const std::vector<int64_t> &plan) {
  if (plan.size() != size_t(kPlanHead + 2 * kSections))
    throw std::invalid_argument("a plan has " + std::to_string(kPlanHead + 2 * kSections) + " integers, got " +
                                std::to_string(plan.size()));
  return compressed_at(pointer<const uint8_t>(blob), plan.data());
}

int64_t crc32c_of(const uint8_t *data, int64_t bytes, int isa) {
  int64_t crc = 0;
  crc32c_cpu(data, bytes, std::max<int64_t>(bytes, 1), &crc, isa);
  return crc;
}

} // namespace

void bind_lossless(py::module_ &m) {
  m.def(
      "lossless_decode_cpu",
      [](uintptr_t blob, const std::vector<int64_t> &plan, int item, int64_t first, int64_t count, uintptr_t out,
         int isa) {
        const Compressed c = compressed_of(blob, plan);
        py::gil_scoped_release release;
        lossless_decode_cpu(c, item, first, count, pointer<uint8_t>(out), isa);
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("item"), py::arg("first"), py::arg("count"),
      py::arg("out"), py::arg("isa"));
  m.def(
      "lossless_decode_checked_cpu",
      [](uintptr_t blob, const std::vector<int64_t> &plan, int item, uintptr_t out, int isa) {
        const Compressed c = compressed_of(blob, plan);
        py::gil_scoped_release release;
        return lossless_decode_checked_cpu(c, item, pointer<uint8_t>(out), isa);
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("item"), py::arg("out"), py::arg("isa"));
  m.def(
      "lossless_rows_cpu",
      [](uintptr_t blob, const std::vector<int64_t> &plan, int item, uintptr_t index, int64_t count, uintptr_t out,
         int isa) {
        const Compressed c = compressed_of(blob, plan);
        py::gil_scoped_release release;
        return lossless_rows_cpu(c, item, pointer<int64_t>(index), count, pointer<uint8_t>(out), isa);
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("item"), py::arg("index"), py::arg("count"),
      py::arg("out"), py::arg("isa"));
  m.def(
      "crc32c_cpu",
      [](uintptr_t data, int64_t bytes, int64_t block, uintptr_t crcs, int isa) {
        py::gil_scoped_release release;
        crc32c_cpu(pointer<uint8_t>(data), bytes, block, pointer<int64_t>(crcs), isa);
      },
      py::kw_only(), py::arg("data"), py::arg("bytes"), py::arg("block"), py::arg("crcs"), py::arg("isa"));
  m.def(
      "crc32c_of_cpu",
      [](uintptr_t data, int64_t bytes, int isa) {
        py::gil_scoped_release release;
        return crc32c_of(pointer<uint8_t>(data), bytes, isa);
      },
      py::kw_only(), py::arg("data"), py::arg("bytes"), py::arg("isa"));
  m.def(
      "crc32c_of_bytes_cpu",
      [](const py::bytes &data, int isa) {
        const std::string_view bytes = data;
        return crc32c_of(reinterpret_cast<const uint8_t *>(bytes.data()), int64_t(bytes.size()), isa);
      },
      py::arg("data"), py::kw_only(), py::arg("isa"));
}
