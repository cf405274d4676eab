// Python name of the CUDA decoder of DFloat11: csrc/cuda/dfloat11_decode.h says what each field is.
#include <pybind11/pybind11.h>

#ifdef FASTLOSS_CUDA
#include "cuda/dfloat11_decode.h"

namespace py = pybind11;
using namespace fastloss;
#endif

void bind_dfloat11_cuda([[maybe_unused]] pybind11::module_ &m) {
#ifdef FASTLOSS_CUDA // a launch takes microseconds: the GIL stays
  m.def(
      "dfloat11_decode_cuda",
      [](uintptr_t luts, int64_t tables, uintptr_t codes, int64_t code_bytes, uintptr_t sign_mantissa,
         uintptr_t output_positions, uintptr_t gaps, int64_t gap_bytes, uintptr_t out, int64_t numel, int threads,
         int device, uintptr_t stream) {
        const auto bytes = [](uintptr_t address) { return reinterpret_cast<const uint8_t *>(address); };
        dfloat11_decode_cuda({bytes(luts), tables, bytes(codes), code_bytes, bytes(sign_mantissa),
                              reinterpret_cast<const uint32_t *>(output_positions), bytes(gaps), gap_bytes,
                              reinterpret_cast<void *>(out), numel, threads},
                             device, reinterpret_cast<void *>(stream));
      },
      py::kw_only(), py::arg("luts"), py::arg("tables"), py::arg("codes"), py::arg("code_bytes"),
      py::arg("sign_mantissa"), py::arg("output_positions"), py::arg("gaps"), py::arg("gap_bytes"), py::arg("out"),
      py::arg("numel"), py::arg("threads"), py::arg("device"), py::arg("stream"));
#endif
}
