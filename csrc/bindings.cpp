// Python names of the kernels. Pointers arrive as integers (tensor.data_ptr()); python/fastloss has the checks.
#include <pybind11/pybind11.h>

#include <tuple>

#include "bindings_pairs.h"
#include "cpu/add_product.h"
#include "cpu/cpu.h"
#include "cpu/cross_entropy.h"
#include "cpu/kept_memory.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/pointwise_loss.h"
#include "cpu/region_stats.h"
#include "cpu/targets.h"
#include "fastloss.h"
#ifdef FASTLOSS_CUDA
#include "cuda/cuda.h"
#endif

namespace py = pybind11;
using namespace fastloss;

namespace {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

// A block of kept memory as a Python buffer: a tensor over it gives it back when the tensor's storage dies.
struct Memory {
  explicit Memory(size_t size) : bytes(size), address(take_memory(size)) {}
  ~Memory() { give_memory(address, bytes); }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  size_t bytes;
  void *address;
};

RowStats row_stats_of(int mode, uintptr_t logits, uintptr_t target, uintptr_t prob, uintptr_t column_weight,
                      uintptr_t temperature, uintptr_t row, uintptr_t stats, uintptr_t argmax, uintptr_t dlogits,
                      int64_t n, int64_t v, int64_t ld, int64_t ld_prob, int64_t ld_out, int64_t ignore_index,
                      int dtype, int prob_dtype, int want, float scale, float softcap, int margin_loss, double margin_a,
                      double margin_b) {
  return {pointer<void>(logits),
          pointer<int64_t>(target),
          pointer<void>(prob),
          pointer<float>(column_weight),
          pointer<float>(temperature),
          pointer<float>(row),
          pointer<float>(stats),
          pointer<int64_t>(argmax),
          pointer<void>(dlogits),
          n,
          v,
          ld,
          ld_prob,
          ld_out,
          ignore_index,
          dtype,
          prob_dtype,
          mode,
          want,
          scale,
          softcap,
          nullptr,
          margin_loss,
          margin_a,
          margin_b};
}

RegionStats region_stats_of(uintptr_t logits, uintptr_t target, uintptr_t mask, uintptr_t coef, uintptr_t stats,
                            uintptr_t dlogits, int64_t n, int64_t size, int64_t mask_share, int dtype, int target_dtype,
                            int want, float sharpness) {
  return {pointer<void>(logits),
          pointer<void>(target),
          pointer<uint8_t>(mask),
          pointer<float>(coef),
          pointer<float>(stats),
          pointer<void>(dlogits),
          n,
          size,
          mask_share,
          dtype,
          target_dtype,
          want,
          sharpness};
}

// (address, dtype, period) of Python.
Elements elements_of(const std::tuple<uintptr_t, int, int64_t> &t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

} // namespace

void bind_edges(py::module_ &m);                // bindings_edges.cpp
void bind_bits(py::module_ &m);                 // bindings_bits.cpp
void bind_groups(py::module_ &m);               // bindings_groups.cpp
void bind_hash(py::module_ &m);                 // bindings_hash.cpp
void bind_lowbit(py::module_ &m);               // bindings_lowbit.cpp
void bind_pair_maps(py::module_ &m);            // bindings_pair_maps.cpp
void bind_bits_cuda(py::module_ &m);            // bindings_bits_cuda.cpp
void bind_quant(py::module_ &m);                // bindings_quant.cpp
void bind_lossless(py::module_ &m);             // bindings_lossless.cpp
void bind_lossless_encode(py::module_ &m);      // bindings_lossless_encode.cpp
void bind_lossless_r8(py::module_ &m);          // bindings_lossless_r8.cpp
void bind_lossless_linear_cuda(py::module_ &m); // bindings_lossless_linear_cuda.cpp
void bind_dfloat11_cuda(py::module_ &m);        // bindings_dfloat11_cuda.cpp
void bind_lossless_cuda(py::module_ &m);        // bindings_lossless_cuda.cpp

LinearCrossEntropy linear_of(uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t target, uintptr_t column_weight,
                             uintptr_t epilogue, uintptr_t stats, uintptr_t dx, uintptr_t dw, uintptr_t dbias,
                             int64_t n, int64_t d, int64_t v, int64_t ldx, int64_t ldw, int64_t ignore_index,
                             int64_t max_extra_bytes, int dtype, int want, float scale, float softcap, int margin_loss,
                             double margin_a, double margin_b) {
  return {pointer<void>(x),
          pointer<void>(w),
          pointer<float>(bias),
          pointer<int64_t>(target),
          pointer<float>(column_weight),
          pointer<float>(epilogue),
          pointer<float>(stats),
          pointer<void>(dx),
          pointer<void>(dw),
          pointer<float>(dbias),
          nullptr,
          n,
          d,
          v,
          ldx,
          ldw,
          ignore_index,
          max_extra_bytes,
          dtype,
          want,
          margin_loss,
          margin_a,
          margin_b,
          scale,
          softcap};
}

RowSample row_sample_of(uintptr_t logits, uintptr_t seed, uintptr_t streams, uintptr_t index, uintptr_t logp, int64_t n,
                        int64_t v, int64_t ld, int dtype, float scale, float softcap) {
  return {pointer<void>(logits),
          pointer<int64_t>(seed),
          pointer<int64_t>(streams),
          pointer<int64_t>(index),
          pointer<float>(logp),
          n,
          v,
          ld,
          dtype,
          scale,
          softcap};
}

#define ROW_SAMPLE_KEYWORDS                                                                                            \
  py::kw_only(), py::arg("logits"), py::arg("seed"), py::arg("streams"), py::arg("index"), py::arg("logp"),            \
      py::arg("n"), py::arg("v"), py::arg("ld"), py::arg("dtype"), py::arg("scale"), py::arg("softcap")

RowTerms row_terms_of(uintptr_t logits, uintptr_t listed, uintptr_t teacher, uintptr_t value, uintptr_t subset,
                      uintptr_t temperature, uintptr_t coef, uintptr_t stats, uintptr_t argmax, uintptr_t dlogits,
                      int64_t n, int64_t v, int64_t k, int64_t ld, int64_t ld_teacher, int64_t ld_out,
                      int64_t ignore_index, int dtype, int teacher_dtype, int mode, int want, int term, float scale,
                      float softcap, float a, float b, float c, double nll_share, double term_share) {
  return {pointer<void>(logits),
          pointer<int64_t>(listed),
          pointer<void>(teacher),
          pointer<float>(value),
          pointer<uint8_t>(subset),
          pointer<float>(temperature),
          pointer<float>(coef),
          pointer<float>(stats),
          pointer<int64_t>(argmax),
          pointer<void>(dlogits),
          n,
          v,
          k,
          ld,
          ld_teacher,
          ld_out,
          ignore_index,
          dtype,
          teacher_dtype,
          mode,
          want,
          term,
          scale,
          softcap,
          a,
          b,
          c,
          nll_share,
          term_share};
}

// One keyword for each field of RowStats, in the order of row_stats_of.
#define ROW_STATS_KEYWORDS                                                                                             \
  py::arg("mode"), py::arg("logits"), py::arg("target"), py::arg("prob"), py::arg("column_weight"),                    \
      py::arg("temperature"), py::arg("row"), py::arg("stats"), py::arg("argmax"), py::arg("dlogits"), py::arg("n"),   \
      py::arg("v"), py::arg("ld"), py::arg("ld_prob"), py::arg("ld_out"), py::arg("ignore_index"), py::arg("dtype"),   \
      py::arg("prob_dtype"), py::arg("want"), py::arg("scale"), py::arg("softcap"), py::kw_only(),                     \
      py::arg("margin_loss") = 0, py::arg("margin_a") = 0.0, py::arg("margin_b") = 0.0

// And of LinearCrossEntropy.
#define LINEAR_KEYWORDS                                                                                                \
  py::kw_only(), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("target"), py::arg("column_weight"),             \
      py::arg("epilogue"), py::arg("stats"), py::arg("dx"), py::arg("dw"), py::arg("dbias"), py::arg("n"),             \
      py::arg("d"), py::arg("v"), py::arg("ldx"), py::arg("ldw"), py::arg("ignore_index"), py::arg("max_extra_bytes"), \
      py::arg("dtype"), py::arg("want"), py::arg("scale"), py::arg("softcap"),                                         \
      py::arg("margin_loss") = 0, py::arg("margin_a") = 0.0, py::arg("margin_b") = 0.0, py::arg("isa")

// And of RegionStats.
#define REGION_KEYWORDS                                                                                                \
  py::kw_only(), py::arg("logits"), py::arg("target"), py::arg("mask"), py::arg("coef"), py::arg("stats"),             \
      py::arg("dlogits"), py::arg("n"), py::arg("size"), py::arg("mask_share"), py::arg("dtype"),                      \
      py::arg("target_dtype"), py::arg("want"), py::arg("sharpness")

PYBIND11_MODULE(_C, m) {
  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Memory &memory) {
        return py::buffer_info(memory.address, 1, py::format_descriptor<uint8_t>::format(), py::ssize_t(memory.bytes));
      });
  py::class_<RowTerms>(m, "RowTerms")
      .def(py::init(&row_terms_of), py::kw_only(), py::arg("logits"), py::arg("listed"), py::arg("teacher"),
           py::arg("value"), py::arg("subset"), py::arg("temperature"), py::arg("coef"), py::arg("stats"),
           py::arg("argmax"), py::arg("dlogits"), py::arg("n"), py::arg("v"), py::arg("k"), py::arg("ld"),
           py::arg("ld_teacher"), py::arg("ld_out"), py::arg("ignore_index"), py::arg("dtype"),
           py::arg("teacher_dtype"), py::arg("mode"), py::arg("want"), py::arg("term"), py::arg("scale"),
           py::arg("softcap"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("nll_share") = 0.0,
           py::arg("term_share") = 0.0);
  m.def("keep_memory", &keep_memory, py::arg("limit"));
  m.def("best_isa", &best_isa);
  m.def("isa_name", &isa_name, py::arg("isa"));
  m.def(
      "first_bad_target",
      [](uintptr_t target, int64_t n, int64_t v, int64_t ignore_index) {
        return first_bad_target(pointer<int64_t>(target), n, v, ignore_index);
      },
      py::arg("target"), py::arg("n"), py::arg("v"), py::arg("ignore_index"));
  m.def("cross_entropy_epilogue",
        [](uintptr_t target, uintptr_t class_weight, int64_t n, int64_t v, int64_t ignore_index, double label_smoothing,
           double z_loss, bool mean, uintptr_t epilogue) {
          return cross_entropy_epilogue({pointer<int64_t>(target), pointer<float>(class_weight), n, v, ignore_index,
                                         label_smoothing, z_loss, mean},
                                        pointer<float>(epilogue));
        });
  m.def("margin_loss_sum", [](uintptr_t target, int64_t n, int64_t v, int64_t ignore_index, bool mean, int loss,
                              double a, double b, uintptr_t epilogue, uintptr_t stats) {
    return margin_loss_sum({pointer<int64_t>(target), nullptr, n, v, ignore_index, 0, 0, mean}, loss, a, b,
                           pointer<float>(epilogue), pointer<float>(stats));
  });
  m.def("cross_entropy_loss",
        [](uintptr_t target, uintptr_t class_weight, int64_t n, int64_t v, int64_t ignore_index, double label_smoothing,
           double z_loss, bool mean, uintptr_t epilogue, uintptr_t stats) {
          return cross_entropy_loss({pointer<int64_t>(target), pointer<float>(class_weight), n, v, ignore_index,
                                     label_smoothing, z_loss, mean},
                                    pointer<float>(epilogue), pointer<float>(stats));
        });
  m.def(
      "row_stats_cpu",
      [](int mode, uintptr_t logits, uintptr_t target, uintptr_t prob, uintptr_t column_weight, uintptr_t temperature,
         uintptr_t row, uintptr_t stats, uintptr_t argmax, uintptr_t dlogits, int64_t n, int64_t v, int64_t ld,
         int64_t ld_prob, int64_t ld_out, int64_t ignore_index, int dtype, int prob_dtype, int want, float scale,
         float softcap, int margin_loss, double margin_a, double margin_b, int isa) {
        RowStats args = row_stats_of(mode, logits, target, prob, column_weight, temperature, row, stats, argmax,
                                     dlogits, n, v, ld, ld_prob, ld_out, ignore_index, dtype, prob_dtype, want, scale,
                                     softcap, margin_loss, margin_a, margin_b);
        py::gil_scoped_release release;
        row_stats_cpu(args, isa);
      },
      ROW_STATS_KEYWORDS, py::arg("isa"));
  m.def(
      "row_sample_cpu",
      [](uintptr_t logits, uintptr_t seed, uintptr_t streams, uintptr_t index, uintptr_t logp, int64_t n, int64_t v,
         int64_t ld, int dtype, float scale, float softcap, int isa) {
        RowSample args = row_sample_of(logits, seed, streams, index, logp, n, v, ld, dtype, scale, softcap);
        py::gil_scoped_release release;
        row_sample_cpu(args, isa);
      },
      ROW_SAMPLE_KEYWORDS, py::arg("isa"));
  m.def(
      "linear_cross_entropy_cpu",
      [](uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t target, uintptr_t column_weight, uintptr_t epilogue,
         uintptr_t stats, uintptr_t dx, uintptr_t dw, uintptr_t dbias, int64_t n, int64_t d, int64_t v, int64_t ldx,
         int64_t ldw, int64_t ignore_index, int64_t max_extra_bytes, int dtype, int want, float scale, float softcap,
         int margin_loss, double margin_a, double margin_b, int isa) {
        LinearCrossEntropy args =
            linear_of(x, w, bias, target, column_weight, epilogue, stats, dx, dw, dbias, n, d, v, ldx, ldw,
                      ignore_index, max_extra_bytes, dtype, want, scale, softcap, margin_loss, margin_a, margin_b);
        py::gil_scoped_release release;
        linear_cross_entropy_cpu(args, isa);
      },
      LINEAR_KEYWORDS);
  m.def(
      "linear_cross_entropy_why_not", // None, or the reason
      [](uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t target, uintptr_t column_weight, uintptr_t epilogue,
         uintptr_t stats, uintptr_t dx, uintptr_t dw, uintptr_t dbias, int64_t n, int64_t d, int64_t v, int64_t ldx,
         int64_t ldw, int64_t ignore_index, int64_t max_extra_bytes, int dtype, int want, float scale, float softcap,
         int margin_loss, double margin_a, double margin_b, int isa) {
        return linear_cross_entropy_why_not(linear_of(x, w, bias, target, column_weight, epilogue, stats, dx, dw, dbias,
                                                      n, d, v, ldx, ldw, ignore_index, max_extra_bytes, dtype, want,
                                                      scale, softcap, margin_loss, margin_a, margin_b),
                                            isa);
      },
      LINEAR_KEYWORDS);
  m.def(
      "region_stats_cpu",
      [](uintptr_t logits, uintptr_t target, uintptr_t mask, uintptr_t coef, uintptr_t stats, uintptr_t dlogits,
         int64_t n, int64_t size, int64_t mask_share, int dtype, int target_dtype, int want, float sharpness, int isa) {
        RegionStats args = region_stats_of(logits, target, mask, coef, stats, dlogits, n, size, mask_share, dtype,
                                           target_dtype, want, sharpness);
        py::gil_scoped_release release;
        region_stats_cpu(args, isa);
      },
      REGION_KEYWORDS, py::arg("isa"));
  using Operand = std::tuple<uintptr_t, int, int64_t>;
  m.def("pointwise_loss_cpu",
        [](const Operand &input, const Operand &target, const Operand &weight, const Operand &pos_weight,
           const Operand &upstream, uintptr_t loss, const Operand &values, const Operand &dinput, int64_t n, int kind,
           double share, int isa) {
          PointwiseLoss args = {elements_of(input),
                                elements_of(target),
                                elements_of(weight),
                                elements_of(pos_weight),
                                elements_of(upstream),
                                pointer<float>(loss),
                                elements_of(values),
                                elements_of(dinput),
                                nullptr,
                                n,
                                kind,
                                share,
                                false};
          py::gil_scoped_release release;
          pointwise_loss_cpu(args, isa);
        });
  m.def("add_product_why_not", &add_product_why_not, py::arg("isa"));
  m.def(
      "add_product_cpu",
      [](uintptr_t total, uintptr_t a, uintptr_t b, uintptr_t rounded, int64_t n, int64_t v, int64_t d, int64_t lda,
         int64_t ldb, bool first, int isa) {
        py::gil_scoped_release release;
        add_product_cpu({pointer<float>(total), pointer<void>(a), pointer<void>(b), pointer<void>(rounded), n, v, d,
                         lda, ldb, first},
                        isa);
      },
      py::kw_only(), py::arg("total"), py::arg("a"), py::arg("b"), py::arg("rounded"), py::arg("n"), py::arg("v"),
      py::arg("d"), py::arg("lda"), py::arg("ldb"), py::arg("first"), py::arg("isa"));
  m.def(
      "row_terms_cpu",
      [](const RowTerms &args, int isa) {
        py::gil_scoped_release release;
        row_terms_cpu(args, isa);
      },
      py::arg("args"), py::arg("isa"));
  bind_pairs(m);
  bind_edges(m);
  bind_bits(m);
  bind_groups(m);
  bind_hash(m);
  bind_lowbit(m);
  bind_lossless_encode(m);
  bind_pair_maps(m);
  bind_bits_cuda(m);
  bind_quant(m);
  bind_lossless(m);
  bind_lossless_r8(m);
  bind_lossless_linear_cuda(m);
  bind_dfloat11_cuda(m);
  bind_lossless_cuda(m);
#ifdef FASTLOSS_CUDA
  m.attr("cuda") = true;
  m.attr("archs") = FASTLOSS_ARCHS;
  m.def("device_count", &device_count);
  m.def("device_info", &device_info, py::arg("device"));
  m.def( // a launch takes microseconds: the GIL stays
      "row_stats_cuda",
      [](int mode, uintptr_t logits, uintptr_t target, uintptr_t prob, uintptr_t column_weight, uintptr_t temperature,
         uintptr_t row, uintptr_t stats, uintptr_t argmax, uintptr_t dlogits, int64_t n, int64_t v, int64_t ld,
         int64_t ld_prob, int64_t ld_out, int64_t ignore_index, int dtype, int prob_dtype, int want, float scale,
         float softcap, int margin_loss, double margin_a, double margin_b, int device, uintptr_t stream,
         uintptr_t upstream) {
        RowStats args = row_stats_of(mode, logits, target, prob, column_weight, temperature, row, stats, argmax,
                                     dlogits, n, v, ld, ld_prob, ld_out, ignore_index, dtype, prob_dtype, want, scale,
                                     softcap, margin_loss, margin_a, margin_b);
        args.upstream = pointer<float>(upstream);
        row_stats_cuda(args, device, pointer<void>(stream));
      },
      ROW_STATS_KEYWORDS, py::arg("device"), py::arg("stream"), py::arg("upstream"));
  m.def(
      "region_stats_cuda",
      [](uintptr_t logits, uintptr_t target, uintptr_t mask, uintptr_t coef, uintptr_t stats, uintptr_t dlogits,
         int64_t n, int64_t size, int64_t mask_share, int dtype, int target_dtype, int want, float sharpness,
         int slices, int device, uintptr_t stream) {
        RegionStats args = region_stats_of(logits, target, mask, coef, stats, dlogits, n, size, mask_share, dtype,
                                           target_dtype, want, sharpness);
        region_stats_cuda(args, slices, device, pointer<void>(stream));
      },
      REGION_KEYWORDS, py::arg("slices"), py::arg("device"), py::arg("stream"));
  m.def(
      "row_sample_cuda",
      [](uintptr_t logits, uintptr_t seed, uintptr_t streams, uintptr_t index, uintptr_t logp, int64_t n, int64_t v,
         int64_t ld, int dtype, float scale, float softcap, int device, uintptr_t stream) {
        row_sample_cuda(row_sample_of(logits, seed, streams, index, logp, n, v, ld, dtype, scale, softcap), device,
                        pointer<void>(stream));
      },
      ROW_SAMPLE_KEYWORDS, py::arg("device"), py::arg("stream"));
  m.attr("MOST_LISTED") = kMostListed;
  m.def(
      "row_terms_cuda",
      [](const RowTerms &args, int device, uintptr_t stream) { row_terms_cuda(args, device, pointer<void>(stream)); },
      py::arg("args"), py::arg("device"), py::arg("stream"));
  m.def("scale_cuda", [](uintptr_t x, int dtype, int64_t n, uintptr_t factor, int device, uintptr_t stream) {
    scale_cuda(pointer<void>(x), dtype, n, pointer<float>(factor), device, pointer<void>(stream));
  });
  m.attr("MOST_PARTIALS") = kMostPartials;
  m.def("pointwise_loss_cuda",
        [](const Operand &input, const Operand &target, const Operand &weight, const Operand &pos_weight,
           const Operand &upstream, uintptr_t loss, const Operand &values, const Operand &dinput, int64_t n, int kind,
           double share, uintptr_t partial, bool unless_one, int device, uintptr_t stream) {
          PointwiseLoss args = {elements_of(input),
                                elements_of(target),
                                elements_of(weight),
                                elements_of(pos_weight),
                                elements_of(upstream),
                                pointer<float>(loss),
                                elements_of(values),
                                elements_of(dinput),
                                pointer<double>(partial),
                                n,
                                kind,
                                share,
                                unless_one};
          pointwise_loss_cuda(args, device, pointer<void>(stream));
        });
#else
  m.attr("cuda") = false;
  m.attr("archs") = "";
#endif
}
