// Python names of the loops of R8 and DFloat11: csrc/cpu/{r8_decode,r8_encode,r8_frequencies,dfloat11_decode}.h say
// what each field is.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/dfloat11_decode.h"
#include "cpu/lossless_blocks.h"
#include "cpu/r8_decode.h"
#include "cpu/r8_encode.h"
#include "cpu/r8_frequencies.h"

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

// All `numel` bytes. For tests: lossless_decode is what decodes a tensor.
void decode_plane(uintptr_t frequencies, uintptr_t offsets, uintptr_t data, int64_t data_bytes, int64_t numel,
                  uintptr_t out, int isa) {
  const RansPlane plane = {pointer<uint8_t>(frequencies), pointer<uint64_t>(offsets), pointer<uint8_t>(data),
                           data_bytes};
  py::gil_scoped_release release;
  const RansTable table(plane.frequencies);
  const ThreadRoom room(1, kRansBlocks * kLosslessBlock);
  const int64_t blocks = lossless_blocks(numel);
  for (int64_t b = 0; b < blocks; b += kRansBlocks) {
    RansBlocks some(plane, b, std::min(kRansBlocks, blocks - b));
    some.decode(table, kLosslessBlock / kRansLanes, room.of(0), kLosslessBlock, isa);
    const int64_t first = b * kLosslessBlock;
    std::memcpy(pointer<uint8_t>(out) + first, room.of(0),
                size_t(std::min(numel - first, kRansBlocks * kLosslessBlock)));
  }
}

} // namespace

void bind_lossless_r8(py::module_ &m) {
  m.def("r8_decode_cpu", &decode_plane, py::kw_only(), py::arg("frequencies"), py::arg("offsets"), py::arg("data"),
        py::arg("data_bytes"), py::arg("numel"), py::arg("out"), py::arg("isa"));
  py::class_<RansPayloads>(m, "RansPayloads")
      .def("bytes", &RansPayloads::bytes)
      .def("copy_to", [](const RansPayloads &payloads, uintptr_t data) {
        py::gil_scoped_release release;
        payloads.copy_to(pointer<uint8_t>(data));
      });
  m.def(
      "r8_encode_cpu",
      [](uintptr_t plane, uintptr_t frequencies, int64_t numel, uintptr_t offsets, int isa) {
        py::gil_scoped_release release;
        return std::make_unique<RansPayloads>(r8_encode_cpu(pointer<uint8_t>(plane), pointer<uint8_t>(frequencies),
                                                            numel, pointer<int64_t>(offsets), isa));
      },
      py::kw_only(), py::arg("plane"), py::arg("frequencies"), py::arg("numel"), py::arg("offsets"), py::arg("isa"));
  m.def( // some microseconds: the GIL stays
      "r8_frequencies_cpu",
      [](uintptr_t counts, uintptr_t log2, uintptr_t frequencies) {
        return r8_frequencies_cpu(pointer<int64_t>(counts), pointer<int32_t>(log2), pointer<uint8_t>(frequencies));
      },
      py::kw_only(), py::arg("counts"), py::arg("log2"), py::arg("frequencies"));
  m.def(
      "dfloat11_decode_cpu",
      [](uintptr_t luts, int tables, uintptr_t codes, int64_t code_bytes, uintptr_t sign_mantissa, uintptr_t positions,
         uintptr_t gaps, int64_t numel, int64_t blocks, int bytes_per_thread, int threads_per_block, uintptr_t out) {
        const Dfloat11 args = {pointer<uint8_t>(luts),
                               tables,
                               pointer<uint8_t>(codes),
                               code_bytes,
                               pointer<uint8_t>(sign_mantissa),
                               pointer<uint32_t>(positions),
                               pointer<uint8_t>(gaps),
                               numel,
                               blocks,
                               bytes_per_thread,
                               threads_per_block,
                               pointer<uint16_t>(out)};
        py::gil_scoped_release release;
        return dfloat11_decode_cpu(args);
      },
      py::kw_only(), py::arg("luts"), py::arg("tables"), py::arg("codes"), py::arg("code_bytes"),
      py::arg("sign_mantissa"), py::arg("positions"), py::arg("gaps"), py::arg("numel"), py::arg("blocks"),
      py::arg("bytes_per_thread"), py::arg("threads_per_block"), py::arg("out"));
}
