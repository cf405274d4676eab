// Python names of the CUDA kernels of lossless codecs: csrc/cuda/lossless_codecs.h says what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef FASTLOSS_CUDA
#include "cuda/lossless_codecs.h"

#include <string>
#include <vector>

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T = void> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

Compressed compressed_of(uintptr_t blob, const std::vector<int64_t> &plan) {
  if (plan.size() != size_t(kPlanHead + 2 * kSections))
    throw py::value_error("a plan has " + std::to_string(kPlanHead + 2 * kSections) + " integers, got " +
                          std::to_string(plan.size()));
  return compressed_at(pointer<const uint8_t>(blob), plan.data());
}

SplitPlanes planes_of(const std::vector<uintptr_t> &bytes, uintptr_t bits) {
  if (bytes.size() > 3) throw py::value_error("numbers have up to 3 byte planes, got " + std::to_string(bytes.size()));
  SplitPlanes planes = {{}, pointer<uint8_t>(bits)};
  for (size_t p = 0; p < bytes.size(); ++p) planes.bytes[p] = pointer<uint8_t>(bytes[p]);
  return planes;
}

} // namespace
#endif

void bind_lossless_cuda([[maybe_unused]] pybind11::module_ &m) {
#ifdef FASTLOSS_CUDA // a launch takes microseconds: the GIL stays
  m.def(
      "lossless_decode_cuda",
      [](uintptr_t blob, const std::vector<int64_t> &plan, int64_t first, int64_t count, uintptr_t out, int device,
         uintptr_t stream) {
        const Compressed c = compressed_of(blob, plan);
        (c.codec == kP7 ? p7_decode_cuda : r8_decode_cuda)({c, first, count, pointer(out)}, device, pointer(stream));
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("first"), py::arg("count"), py::arg("out"),
      py::arg("device"), py::arg("stream"));
  m.def(
      "lossless_rows_cuda",
      [](uintptr_t blob, const std::vector<int64_t> &plan, uintptr_t index, bool wide, int64_t count, uintptr_t out,
         int device, uintptr_t stream) {
        const Compressed c = compressed_of(blob, plan);
        (c.codec == kP7 ? p7_rows_cuda : r8_rows_cuda)({c, pointer(index), wide, count, pointer(out)}, device,
                                                       pointer(stream));
      },
      py::kw_only(), py::arg("blob"), py::arg("plan"), py::arg("index"), py::arg("wide"), py::arg("count"),
      py::arg("out"), py::arg("device"), py::arg("stream"));
  m.def("crc32c_pieces_cuda", &crc32c_pieces, py::arg("size"), py::arg("block"));
  m.def(
      "crc32c_cuda",
      [](uintptr_t data, int64_t size, int64_t block, uintptr_t pieces, uintptr_t out, int device, uintptr_t stream) {
        crc32c_cuda({pointer<const uint8_t>(data), size, block, pointer<uint32_t>(pieces), pointer<int64_t>(out)},
                    device, pointer(stream));
      },
      py::kw_only(), py::arg("data"), py::arg("size"), py::arg("block"), py::arg("pieces"), py::arg("out"),
      py::arg("device"), py::arg("stream"));
  m.def(
      "p7_histogram_cuda",
      [](uintptr_t numbers, int64_t numel, int number, uintptr_t counts, int device, uintptr_t stream) {
        CudaP7Encode p{};
        p.numbers = pointer(numbers), p.numel = numel, p.number = number;
        p.counts = pointer<unsigned long long>(counts);
        p7_histogram_cuda(p, device, pointer(stream));
      },
      py::kw_only(), py::arg("numbers"), py::arg("numel"), py::arg("number"), py::arg("counts"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "p7_encode_cuda",
      [](uintptr_t numbers, int64_t numel, int number, uintptr_t table, uintptr_t codes_of, uintptr_t codes,
         const std::vector<uintptr_t> &bytes, uintptr_t bits, uintptr_t escapes, int device, uintptr_t stream) {
        CudaP7Encode p{};
        p.numbers = pointer(numbers), p.numel = numel, p.number = number, p.table = pointer<uint8_t>(table);
        p.codes_of = pointer<uint8_t>(codes_of), p.codes = pointer<uint8_t>(codes), p.planes = planes_of(bytes, bits);
        p.counts_of_escapes = pointer<int64_t>(escapes);
        p7_encode_cuda(p, device, pointer(stream));
      },
      py::kw_only(), py::arg("numbers"), py::arg("numel"), py::arg("number"), py::arg("table"), py::arg("codes_of"),
      py::arg("codes"), py::arg("bytes"), py::arg("bits"), py::arg("escapes"), py::arg("device"), py::arg("stream"));
  m.def(
      "p7_escapes_cuda",
      [](uintptr_t numbers, int64_t numel, int number, uintptr_t codes, uintptr_t offsets, uintptr_t positions,
         uintptr_t values, int device, uintptr_t stream) {
        CudaP7Encode p{};
        p.numbers = pointer(numbers), p.numel = numel, p.number = number, p.codes = pointer<uint8_t>(codes);
        p.offsets = pointer<int64_t>(offsets), p.positions = pointer<uint16_t>(positions), p.values = pointer(values);
        p7_escapes_cuda(p, device, pointer(stream));
      },
      py::kw_only(), py::arg("numbers"), py::arg("numel"), py::arg("number"), py::arg("codes"), py::arg("offsets"),
      py::arg("positions"), py::arg("values"), py::arg("device"), py::arg("stream"));
  m.def(
      "byte_split_cuda",
      [](uintptr_t numbers, int64_t numel, int number, uintptr_t field, const std::vector<uintptr_t> &bytes,
         uintptr_t bits, int device, uintptr_t stream) {
        byte_split_cuda({pointer(numbers), numel, number, pointer<uint8_t>(field), planes_of(bytes, bits)}, device,
                        pointer(stream));
      },
      py::kw_only(), py::arg("numbers"), py::arg("numel"), py::arg("number"), py::arg("field"), py::arg("bytes"),
      py::arg("bits"), py::arg("device"), py::arg("stream"));
  m.def(
      "byte_histogram_cuda",
      [](uintptr_t plane, int64_t numel, uintptr_t counts, int device, uintptr_t stream) {
        byte_histogram_cuda(pointer<uint8_t>(plane), numel, pointer<unsigned long long>(counts), device,
                            pointer(stream));
      },
      py::kw_only(), py::arg("plane"), py::arg("numel"), py::arg("counts"), py::arg("device"), py::arg("stream"));
  m.attr("R8_SCRATCH") = kR8Scratch;
  m.def(
      "r8_encode_cuda",
      [](uintptr_t plane, int64_t numel, uintptr_t frequencies, uintptr_t scratch, uintptr_t lengths,
         uintptr_t literals, int device, uintptr_t stream) {
        CudaR8Encode p{};
        p.plane = pointer<uint8_t>(plane), p.numel = numel, p.frequencies = pointer<uint8_t>(frequencies);
        p.scratch = pointer<uint8_t>(scratch), p.lengths = pointer<int64_t>(lengths);
        p.literals = pointer<int>(literals);
        r8_encode_cuda(p, device, pointer(stream));
      },
      py::kw_only(), py::arg("plane"), py::arg("numel"), py::arg("frequencies"), py::arg("scratch"), py::arg("lengths"),
      py::arg("literals"), py::arg("device"), py::arg("stream"));
  m.def(
      "r8_move_cuda",
      [](uintptr_t scratch, int64_t numel, uintptr_t literals, uintptr_t offsets, uintptr_t data, int device,
         uintptr_t stream) {
        CudaR8Encode p{};
        p.scratch = pointer<uint8_t>(scratch), p.numel = numel, p.literals = pointer<int>(literals);
        p.offsets = pointer<int64_t>(offsets), p.data = pointer<uint8_t>(data);
        r8_move_cuda(p, device, pointer(stream));
      },
      py::kw_only(), py::arg("scratch"), py::arg("numel"), py::arg("literals"), py::arg("offsets"), py::arg("data"),
      py::arg("device"), py::arg("stream"));
#endif
}
