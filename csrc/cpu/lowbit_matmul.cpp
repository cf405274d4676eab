// docs/design.md, "The bit contract", lowbit_matmul: which engine multiplies, and what it needs beforehand.
//
// Small integers are exact in bf16, so the tile unit makes exact products: of bf16 rows at once, of fp32 rows in three
// bf16 parts that hold all 24 bits. Scales of groups are applied to sums in fp32, never to numbers that are rounded.
#include "linear_cross_entropy.h"
#include "lowbit_matmul_few_rows.h"
#include "lowbit_matmul_run.h"

#include <omp.h>
#include <stdexcept>
#include <string>

namespace fastloss {
namespace lowbit {
namespace {

constexpr int64_t kWordRows = 64;             // rows of x that pass the numbers of one chunk
constexpr int64_t kSerial = int64_t(1) << 20; // bits x rows that are not worth waking a second thread

// What one thread of the kernels in words works in.
struct WordScratch {
  alignas(64) float numbers[16 * kChunk];
  std::vector<float> sums = std::vector<float>(kWordRows * 16);
  std::vector<int32_t> integers = std::vector<int32_t>(kWordRows * 16);
};

struct WordLoops {
  void (*turn)(const uint8_t *bits, int64_t rows, int64_t columns, int64_t row, int64_t column, uint8_t *turned);
  void (*products)(const Problem &p, const float *x, int64_t row, int64_t count, int64_t output, const float *bytes,
                   WordScratch &mine);
  int64_t outputs;
};

} // namespace
} // namespace lowbit

using namespace lowbit;
#define FASTLOSS_LOOPS "lowbit_matmul.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace lowbit {
namespace {

int threads_for(const Problem &p) {
  return p.args.m * (p.end - p.begin) * p.length * p.planes() < kSerial ? 1 : omp_get_max_threads();
}

void run_words(const Problem &p, const WordLoops &loops) {
  std::vector<float> bytes(size_t(p.planes()) * 256 * 8),
      x(size_t(std::min(kWordRows, p.args.m) * p.chunks() * kChunk));
  for (size_t i = 0; i < bytes.size(); ++i) {
    const size_t plane = i / 2048, byte = i / 8 % 256;
    bytes[i] = float((plane ? 0 : p.args.w.offset) + (byte >> i % 8 & 1 ? p.args.w.weights[plane] : 0));
  }
  for (int64_t row = 0; row < p.args.m; row += kWordRows) {
    const int64_t count = std::min(kWordRows, p.args.m - row);
    for (int64_t r = 0; r < count; ++r) float_row(p, row + r, x.data() + r * p.chunks() * kChunk);
#pragma omp parallel num_threads(threads_for(p))
    {
      WordScratch mine{};
#pragma omp for schedule(static)
      for (int64_t output = p.begin; output < p.end; output += loops.outputs)
        loops.products(p, x.data(), row, count, output, bytes.data(), mine);
    }
  }
}

#ifdef __x86_64__
template <int ROWS> void run_some(const Problem &p, const float *x, int64_t row) {
  const int64_t groups = (p.end - p.begin + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads_for(p))
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = p.begin + groups * me / team * kLanes;
    const int64_t end = std::min(p.end, p.begin + groups * (me + 1) / team * kLanes);
    if (begin < end) {
      Buffer<float> sums(ROWS * (end - begin));
      Buffer<int32_t> integers(p.integer() ? ROWS * (end - begin) : 0);
      Buffer<FewRows<ROWS>> room(1);
      (new (room.data) FewRows<ROWS>(p, x, row, begin, end, sums.data, integers.data))->run();
    }
  }
}

// Whether the sums in its tables are finite, and it has run.
bool run_few(const Problem &p) {
  const int64_t stride = p.chunks() * kChunk, rows = p.args.m;
  if (rows > kFewRows || rows * p.planes() > kFewSums) return false;
  std::vector<float> x(size_t((rows + 3) / 4 * 4 * stride), 0.f);
  for (int64_t r = 0; r < rows; ++r) float_row(p, r, x.data() + r * stride);
  if (!std::all_of(x.begin(), x.end(), [](float one) { return std::fabs(one) < kLargest; })) return false;
  for (int64_t row = 0; row < rows; row += 4) {
    const float *from = x.data() + row * stride;
    if (rows - row == 1) run_some<1>(p, from, row);
    else if (rows - row == 2) run_some<2>(p, from, row);
    else run_some<4>(p, from, row);
  }
  return true;
}

template <class Tiles> void run_packed(const Problem &p, int parts) { PackedRun<Tiles>(p, parts).run(); }

// Products in bf16 take what is below the smallest normal number as 0: of a row this small, digits that count.
constexpr float kSmallRow = 0x1p-100f;

template <class T> FASTLOSS_AVX512 bool small_row(const Problem &p, const T *row) {
  bool zeros = true;
  for (int64_t column = 0; column < p.length; column += kLanes) {
    const __m512 size = _mm512_abs_ps(load_columns(p, row, column));
    if (_mm512_cmp_ps_mask(size, _mm512_set1_ps(kSmallRow), _CMP_NLT_UQ)) return false; // as nearly always at once
    zeros = zeros && !_mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  }
  return !zeros;
}

template <class T> bool any_small_row(const Problem &p) {
  for (int64_t row = 0; row < p.args.m; ++row)
    if (small_row(p, static_cast<const T *>(p.args.x) + row * p.args.ldx)) return true;
  return false;
}

bool has_small_rows(const Problem &p) {
  if (p.integer()) return false;
  if (p.args.x_dtype == kFloat32) return any_small_row<float>(p);
  if (p.args.x_dtype == kBFloat16) return any_small_row<BFloat16>(p);
  return p.factor && any_small_row<Float16>(p); // fp16 itself has no such numbers
}

void run_avx512(const Problem &p, int level) {
  const bool sixteen = p.args.x_dtype == kBFloat16 && !p.factor;
  if (run_few(p)) return;
  if (level >= kAvx512Bf16 && has_small_rows(p)) level = kAvx512;
  if (level >= kAmxBf16 && p.integer() && has_amx_int8()) run_packed<TileUnit<true>>(p, 1);
  else if (level >= kAmxBf16 && (p.integer() || sixteen)) run_packed<TileUnit<false>>(p, 1);
  else if (level >= kAmxBf16)
    run_packed<TileUnit<false>>(p, p.args.y_dtype == kFloat32 && (p.factor || p.args.x_dtype == kFloat32) ? 3 : 2);
  else if (level >= kAvx512Bf16 && p.integer() && __builtin_cpu_supports("avx512vnni")) run_packed<VnniTiles>(p, 1);
  else if (level >= kAvx512Bf16 && (p.integer() || sixteen)) run_packed<VectorTiles<linear::Bf16Tiles>>(p, 1);
  else run_packed<VectorTiles<linear::Fp32Tiles>>(p, 1);
}
#endif

int level_of(int isa) {
  int best = best_isa();
#ifdef __x86_64__
  if (best == kAvx512Bf16 && linear::has_amx_bf16()) best = kAmxBf16;
#endif
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " on this machine, got " +
                                std::to_string(isa));
  return isa == kBestIsa ? best : isa;
}

WordLoops loops_of(int level) {
#ifdef __x86_64__
  if (level >= kAvx512Bf16) return avx512bf16::word_loops();
  if (level == kAvx512) return avx512::word_loops();
  if (level == kAvx2) return avx2::word_loops();
#endif
  return scalar::word_loops();
}

// Planes [planes][columns][row_bytes(rows)] of the transposed matrix.
void turn(const Planes &w, const WordLoops &loops, uint8_t *turned) {
  const int64_t rows = (w.rows + kChunk - 1) / kChunk, columns = (w.columns + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(w.rows *w.columns < kSerial ? 1 : omp_get_max_threads())
  for (int64_t i = 0; i < w.count * rows * columns; ++i) {
    const int64_t plane = i / (rows * columns), row = i / columns % rows, column = i % columns;
    loops.turn(w.bits + plane * w.rows * row_bytes(w.columns), w.rows, w.columns, row * kChunk, column * kChunk,
               turned + plane * w.columns * row_bytes(w.rows));
  }
}

void multiply(const Problem &p, int level, [[maybe_unused]] const WordLoops &loops) {
#ifdef __x86_64__
  if (level >= kAvx512) return run_avx512(p, level);
#endif
  run_words(p, loops);
}

} // namespace
} // namespace lowbit

void lowbit_matmul_cpu(const LowbitMatmul &args, int isa) {
  const int level = level_of(isa);
  const WordLoops loops = loops_of(level);
  const Planes &w = args.w;
  const int64_t n = args.transposed ? w.columns : w.rows, length = args.transposed ? w.rows : w.columns;
  if (!args.m || !n || !length) return;
  Buffer<uint8_t> turned(args.transposed ? w.count * n * row_bytes(length) : 0);
  if (args.transposed) turn(w, loops, turned.data);
  Problem p{args, args.transposed ? turned.data : w.bits, n, length, row_bytes(length), 0, n, nullptr, {}};
  for (int code = 0; code < kCodes; ++code) {
    int value = w.offset;
    for (int plane = 0; plane < w.count; ++plane) value += code >> plane & 1 ? w.weights[plane] : 0;
    p.values[code] = float(value);
  }
  if (!args.transposed || !args.scale || args.scale_rows == 1) return multiply(p, level, loops);
  // Each row of the matrix has its own scale: x is times that, group by group of the outputs.
  std::vector<float> factor(size_t(length), 0.f);
  p.factor = factor.data();
  for (int64_t g = 0; g < args.groups; ++g) {
    for (int64_t r = 0; r < length; ++r) factor[size_t(r)] = args.scale[r * args.groups + g];
    p.begin = g * args.group, p.end = args.groups == 1 ? n : std::min(n, p.begin + args.group);
    multiply(p, level, loops);
  }
}

} // namespace fastloss
