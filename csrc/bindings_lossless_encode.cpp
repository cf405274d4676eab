// Python names of the encoders of lossless compression: csrc/cpu/p7_encode.h, r8_encode.h and lossless_split.h say
// what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/byte_histogram.h"
#include "cpu/lossless_linear.h"
#include "cpu/p7_encode.h"
#include "cpu/r8_encode.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

ByteSplit split_of(uintptr_t x, int number, int64_t numel, uintptr_t field, const std::vector<uintptr_t> &planes,
                   uintptr_t bits, uintptr_t block_crc = 0) {
  if (number < kBf16 || number > kE5m2 || int(planes.size()) != kSplits[number].byte_planes)
    throw std::invalid_argument("a number of kind 0 to 4 and its byte planes, got kind " + std::to_string(number) +
                                " and " + std::to_string(planes.size()));
  ByteSplit split = {pointer<void>(x),
                     number,
                     numel,
                     pointer<uint8_t>(field),
                     {},
                     pointer<uint8_t>(bits),
                     pointer<uint32_t>(block_crc)};
  for (size_t p = 0; p < planes.size(); ++p) split.bytes[p] = pointer<uint8_t>(planes[p]);
  return split;
}

} // namespace

void bind_lossless_encode(py::module_ &m) {
  py::class_<Escapes>(m, "Escapes")
      .def_property_readonly("count", &Escapes::count)
      .def("any", &Escapes::any, py::arg("plane"))
      .def(
          "write",
          [](const Escapes &escapes, uintptr_t positions, uintptr_t values) {
            py::gil_scoped_release release;
            escapes.write(pointer<uint16_t>(positions), pointer<uint8_t>(values));
          },
          py::kw_only(), py::arg("positions"), py::arg("values"));
  m.def(
      "p7_histogram_cpu",
      [](uintptr_t x, int number, int64_t numel, uintptr_t counts, int isa) {
        py::gil_scoped_release release;
        p7_histogram_cpu(pointer<void>(x), number, numel, pointer<int64_t>(counts), isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("numel"), py::arg("counts"), py::arg("isa"));
  m.def(
      "p7_encode_cpu",
      [](uintptr_t x, int number, int64_t numel, uintptr_t table, uintptr_t codes, const std::vector<uintptr_t> &planes,
         uintptr_t bits, uintptr_t offsets, uintptr_t block_crc, uintptr_t sums, int isa) {
        const P7Encode args = {split_of(x, number, numel, 0, planes, bits, block_crc), pointer<uint8_t>(table),
                               pointer<uint8_t>(codes), pointer<uint64_t>(offsets), pointer<SectionSums>(sums)};
        py::gil_scoped_release release;
        return p7_encode_cpu(args, isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("numel"), py::arg("table"), py::arg("codes"),
      py::arg("planes"), py::arg("bits"), py::arg("offsets"), py::arg("block_crc"), py::arg("sums"), py::arg("isa"));
  m.def(
      "byte_split_cpu",
      [](uintptr_t x, int number, int64_t numel, uintptr_t field, const std::vector<uintptr_t> &planes, uintptr_t bits,
         int isa) {
        const ByteSplit args = split_of(x, number, numel, field, planes, bits);
        py::gil_scoped_release release;
        byte_split_cpu(args, isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("numel"), py::arg("field"), py::arg("planes"),
      py::arg("bits"), py::arg("isa"));
  m.def(
      "byte_histogram_cpu",
      [](uintptr_t plane, int64_t numel, uintptr_t counts, int isa) {
        py::gil_scoped_release release;
        byte_histogram_cpu(pointer<uint8_t>(plane), numel, pointer<int64_t>(counts), isa);
      },
      py::kw_only(), py::arg("plane"), py::arg("numel"), py::arg("counts"), py::arg("isa"));
  m.def(
      "field_histogram_cpu",
      [](uintptr_t x, int number, int64_t numel, uintptr_t counts, int isa) {
        py::gil_scoped_release release;
        field_histogram_cpu(pointer<void>(x), number, numel, pointer<int64_t>(counts), isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("numel"), py::arg("counts"), py::arg("isa"));
  m.def(
      "r8_encode_numbers_cpu",
      [](uintptr_t x, int number, int64_t numel, uintptr_t frequencies, const std::vector<uintptr_t> &planes,
         uintptr_t bits, uintptr_t offsets, uintptr_t data, int64_t room, uintptr_t block_crc, uintptr_t sums,
         int isa) {
        const R8Numbers args = {split_of(x, number, numel, 0, planes, bits, block_crc),
                                pointer<uint8_t>(frequencies),
                                pointer<int64_t>(offsets),
                                pointer<uint8_t>(data),
                                room,
                                pointer<SectionSums>(sums)};
        py::gil_scoped_release release;
        return r8_encode_numbers_cpu(args, isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("numel"), py::arg("frequencies"), py::arg("planes"),
      py::arg("bits"), py::arg("offsets"), py::arg("data"), py::arg("room"), py::arg("block_crc"), py::arg("sums"),
      py::arg("isa"));
  m.def(
      "sample_planes_cpu",
      [](uintptr_t x, int number, int64_t blocks, int64_t apart, uintptr_t counts, int isa) {
        py::gil_scoped_release release;
        sample_planes_cpu(pointer<void>(x), number, blocks, apart, pointer<int64_t>(counts), isa);
      },
      py::kw_only(), py::arg("x"), py::arg("number"), py::arg("blocks"), py::arg("apart"), py::arg("counts"),
      py::arg("isa"));
  m.def(
      "lossless_linear_cpu",
      [](uintptr_t blob, const std::vector<int64_t> &plan, uintptr_t x, int64_t n, uintptr_t bias, uintptr_t out,
         int isa) {
        if (plan.size() != size_t(kPlanHead + 2 * kSections))
          throw std::invalid_argument("a plan has " + std::to_string(kPlanHead + 2 * kSections) + " integers, got " +
                                      std::to_string(plan.size()));
        const LosslessLinear args = {compressed_at(pointer<uint8_t>(blob), plan.data()), pointer<uint16_t>(x), n,
                                     pointer<uint16_t>(bias), pointer<uint16_t>(out)};
        py::gil_scoped_release release;
        return lossless_linear_cpu(args, isa);
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("x"), py::arg("n"), py::arg("bias"), py::arg("out"),
      py::arg("isa"));
}
