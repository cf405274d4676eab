// Python name of the CUDA product with compressed weights: csrc/cuda/lossless_linear.h says what each field is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef FASTLOSS_CUDA
#include "cuda/lossless_linear.h"

#include <string>
#include <vector>

namespace py = pybind11;
using namespace fastloss;
#endif

void bind_lossless_linear_cuda([[maybe_unused]] pybind11::module_ &m) {
#ifdef FASTLOSS_CUDA // a launch takes microseconds: the GIL stays
  m.def(
      "lossless_linear_parts_cuda",
      [](int64_t rows, int64_t columns, int device) {
        const LosslessLinearPlan plan = lossless_linear_plan(rows, columns, device_limits(device));
        return plan.splits > 1 && !plan.cluster ? plan.splits : 0;
      },
      py::arg("rows"), py::arg("columns"), py::arg("device"));
  m.def(
      "lossless_linear_cuda",
      [](uintptr_t x, int64_t n, uintptr_t blob, const std::vector<int64_t> &plan, uintptr_t bias, uintptr_t out,
         uintptr_t parts, int device, uintptr_t stream) {
        if (plan.size() != size_t(kPlanHead + 2 * kSections))
          throw py::value_error("a plan has " + std::to_string(kPlanHead + 2 * kSections) + " integers, got " +
                                std::to_string(plan.size()));
        lossless_linear_cuda({compressed_at(reinterpret_cast<const uint8_t *>(blob), plan.data()),
                              reinterpret_cast<const void *>(x), n, reinterpret_cast<const void *>(bias),
                              reinterpret_cast<void *>(out), reinterpret_cast<float *>(parts)},
                             device, reinterpret_cast<void *>(stream));
      },
      py::kw_only(), py::arg("x"), py::arg("n"), py::arg("blob"), py::arg("plan"), py::arg("bias"), py::arg("out"),
      py::arg("parts"), py::arg("device"), py::arg("stream"));
#endif
}
